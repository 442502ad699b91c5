"""From ONNX to Relax.

``import_model`` walks the graph once. What depends on constants only is evaluated with numpy, shapes are followed as integers and symbolic
dimensions, and every other node is turned by its *converter* into Relax operators. Converters are registered by domain and operator type
(:mod:`bnntvm.importer.registry`), in files by theme; packages add theirs through the entry point group ``bnntvm.importer``.
"""

from .graph import import_model
from .model import Imported, LayerInfo, TensorInfo
from .registry import converts

__all__ = ["Imported", "LayerInfo", "TensorInfo", "converts", "import_model"]
