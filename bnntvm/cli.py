"""The command ``bnntvm``: build, run, explain, bench, profile, tune, package, export-c, rpc-server, targets.

Exit status: 0 done, 1 a :class:`bnntvm.BnnError` (its message is on standard error), 2 wrong usage. Results go to standard output, progress
and errors to standard error. Only what a command needs is imported, so that ``--help`` answers at once.
"""

import contextlib
import json
import pathlib
import signal
import sys
import threading
import time

import click

import bnntvm
from bnntvm.errors import BnnError, InputError

_EXAMPLES = """
\b
Examples:
  bnntvm build quicknet.onnx -o quicknet.bnn
  bnntvm run quicknet.bnn --input images=photo.npy --output results
  bnntvm explain quicknet.bnn
  bnntvm bench quicknet.onnx --compare --threads 1
  bnntvm tune quicknet.onnx --trials 500 --database quicknet.tune
  bnntvm targets

An artefact (.bnn) is native code: run only those whose maker you trust.
"""


class _Group(click.Group):
    """A group whose commands report a BnnError as a message and exit status 1."""

    def invoke(self, context):
        pressed = _notice_ctrl_c()
        if context.parent is None:
            pressed.clear()
        try:
            return super().invoke(context)
        except Exception as error:
            if pressed:  # what TVM, or whoever called it, has made of the KeyboardInterrupt that went through its code
                raise KeyboardInterrupt from None
            if not isinstance(error, BnnError):
                raise
            click.echo(f"error: {error}", err=True)
            context.exit(1)


def _notice_ctrl_c():
    """A list that is not empty any more once Ctrl-C has been pressed, which raises KeyboardInterrupt as before."""
    before = signal.getsignal(signal.SIGINT)
    if hasattr(before, "pressed"):
        return before.pressed

    def handle(number, frame):
        handle.pressed.append(number)
        signal.default_int_handler(number, frame)

    handle.pressed = []
    if threading.current_thread() is threading.main_thread() and before is signal.default_int_handler:
        signal.signal(signal.SIGINT, handle)
    return handle.pressed


@click.group(cls=_Group, epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(bnntvm.__version__, prog_name="bnntvm")
def main():
    """Compile binarised ONNX networks into bit-packed code, and run what was compiled."""


def _build_options(command):
    """Options of every command that may build."""
    for option in (
        click.option(
            "--weight-tolerance",
            type=click.FloatRange(0),
            default=0.0,
            help="Take weights as two-level if none is further off, relatively.",
        ),
        click.option("--verify", is_flag=True, help="Check the result of every pass in numpy, and the machine code: slow."),
        click.option("--assume-nonzero", is_flag=True, help="Promise that no input of a Sign is ever exactly 0."),
        click.option("--target", default="x86", show_default=True, help="x86 (this machine), or one that `bnntvm targets` lists."),
        click.option("--tuning", multiple=True, metavar="DIR", help="Records of `bnntvm tune` to use before those of the package."),
        click.option("--threads", type=click.IntRange(1), help="Threads [default: BNNTVM_NUM_THREADS, else one per core]."),
    ):
        command = option(command)
    return command


def _board_options(command):
    """Options of every command that can run on a board."""
    for option in (
        click.option("--key", help="The key under which the board is registered."),
        click.option("--rpc", metavar="HOST:PORT", help="Run on a board of this RPC tracker; --target names its processor."),
    ):
        command = option(command)
    return command


_FILE = click.Path(dir_okay=False, path_type=pathlib.Path)
_MODEL = click.Path(exists=True, dir_okay=False, path_type=pathlib.Path)


@main.command(short_help="ONNX file to artefact.", epilog="\b\nExample:\n  bnntvm build quicknet.onnx -o quicknet.bnn --target x86-64-v3")
@click.argument("model", type=_MODEL)
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=pathlib.Path), help="Artefact to write [default: MODEL with .bnn]."
)
@_build_options
def build(model, output, **options):
    """Compile the ONNX file MODEL to an artefact."""
    from bnntvm import artefact

    output = artefact.check_place(output or model.with_suffix(".bnn"))
    if output.exists() and output.samefile(model):
        raise click.UsageError(f"the artefact would replace the model {model}: --output FILE names another")
    start = time.perf_counter()
    module = _build(model, options)
    module.export(output)
    from bnntvm.report import LOW_BIT, human_bytes

    layers = module.report.layers
    click.echo(
        f"{output}: {human_bytes(output.stat().st_size)} from {human_bytes(model.stat().st_size)} of ONNX, "
        f"{sum(layer.kind in LOW_BIT for layer in layers)} of {len(layers)} layers on low bits, "
        f"target {module.report.target}, {time.perf_counter() - start:.1f} s"
    )


@main.command(
    short_help="Run once, show or store the outputs.",
    epilog="\b\nExamples:\n  bnntvm run net.bnn --input images=photo.npy --output results\n  bnntvm run net.onnx --random",
)
@click.argument("model", type=_MODEL)
@click.option("-i", "--input", "inputs", multiple=True, metavar="NAME=FILE.npy", help="An input; NAME= may be left out if there is one.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=pathlib.Path), help="Folder for one .npy file per output.")
@click.option("--random", is_flag=True, help="Random values for the inputs that are not given.")
@click.option("--no-check-finite", is_flag=True, help="Let NaN and infinity through.")
@_board_options
@_build_options
def run(model, inputs, output, random, no_check_finite, rpc, key, **options):
    """Run MODEL, an artefact or an ONNX file, once, and show or store its outputs."""
    module = _open_there(model, options, rpc, key)
    feed = (module.random_feed() if random else {}) | _read_inputs(module, inputs)
    outputs = module.run(feed, check_finite=not no_check_finite)
    files = _store(outputs, output) if output else {}
    for name, array in outputs.items():
        kept = f" -> {files[name]}" if files else ""
        click.echo(f"{name}: {array.dtype}{list(array.shape)}{_summary(array)}{kept}")


@main.command(
    short_help="What became of each layer, and why.",
    epilog="\b\nExample:\n  bnntvm explain quicknet.bnn --json | jq '.layers[] | select(.kind == \"float\")'",
)
@click.argument("model", type=_MODEL)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@_build_options
def explain(model, as_json, **options):
    """Show what became of each layer of MODEL, an artefact or an ONNX file, and why."""
    report = _module(model, options).report
    click.echo(json.dumps(report.as_dict(), indent=1) if as_json else str(report))


@main.command(
    short_help="Time single runs.",
    epilog="\b\nExamples:\n  bnntvm bench net.onnx --compare --threads 1\n  bnntvm bench net.bnn --onnx net.onnx --batch 8",
)
@click.argument("model", type=_MODEL)
@click.option("--compare", is_flag=True, help="Measure ONNX Runtime too, in turns.")
@click.option("--onnx", type=_MODEL, help="ONNX file to compare with where MODEL is an artefact.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Size of dynamic dimensions.")
@click.option("--repeat", type=click.IntRange(1), help="Timed runs [default: what fits into a second, at least 10].")
@_board_options
@_build_options
def bench(model, compare, onnx, batch, repeat, rpc, key, **options):
    """Time single runs of MODEL, an artefact or an ONNX file, on random inputs: median and spread."""
    from bnntvm import artefact

    if rpc and (compare or onnx):
        raise click.UsageError("ONNX Runtime is measured on this machine only: leave --rpc or --compare out")
    if compare and onnx is None and artefact.is_artefact(model):
        raise click.UsageError("an artefact holds no ONNX model: --onnx FILE names the one to compare with")
    module = _open_there(model, options, rpc, key)
    feed = module.random_feed(batch=batch)
    if not (compare or onnx):
        click.echo(f"bnntvm, {_threads(module)}: {module.benchmark(feed, repeat)}")
        return
    other = _onnxruntime(onnx or model, feed, module.threads)
    ours, theirs = module.benchmark(feed, repeat, against=other)
    click.echo(f"bnntvm, {_threads(module)}: {ours}\nONNX Runtime, {_threads(module)}: {theirs}\n{theirs.median_ms / ours.median_ms:.2f}x")


@main.command(
    short_help="Where the time goes, call by call.",
    epilog="\b\nExamples:\n  bnntvm profile net.bnn --roofline roofline.svg\n"
    "  bnntvm profile net.onnx --target aarch64 --rpc desk:9190 --key rpi4b",
)
@click.argument("model", type=_MODEL)
@click.option("--json", "as_json", is_flag=True, help="The profile as JSON.")
@click.option("--chrome-trace", type=_FILE, help="Write a trace for chrome://tracing or Perfetto.")
@click.option("--roofline", type=_FILE, help="Write a picture (.svg, .png); needs matplotlib.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Size of dynamic dimensions.")
@click.option("--seconds", type=click.FloatRange(0.01), default=1.0, show_default=True, help="How long to measure, about.")
@_board_options
@_build_options
def profile(model, as_json, chrome_trace, roofline, batch, seconds, rpc, key, **options):
    """Show the time of every call of MODEL, an artefact or an ONNX file, beside what the machine could do: computing and moving bytes."""
    board = bnntvm.connect(rpc, key) if rpc else None
    module = _module(model, options) if rpc else _open(model, options)
    found = bnntvm.profile(module, board, batch=batch, seconds=seconds)
    click.echo(json.dumps(found.as_dict(), indent=1) if as_json else str(found))
    if chrome_trace:
        try:
            chrome_trace.write_text(json.dumps(found.chrome_trace()))
        except OSError as error:
            raise BnnError("the trace could not be written", where=str(chrome_trace), why=error.strerror or str(error)) from error
    if roofline:
        found.roofline(roofline)


class _Tune(_Group):
    """`bnntvm tune MODEL ...` tunes; `tune show` and `tune merge` are commands of their own."""

    def parse_args(self, context, args):
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["model", *args]
        return super().parse_args(context, args)


@main.group(
    cls=_Tune,
    short_help="Find faster schedules by measuring.",
    epilog="\b\nExamples:\n  bnntvm tune net.onnx --trials 500 --database net.tune --time-limit 30m\n"
    "  bnntvm build net.onnx --tuning net.tune\n"
    "  bnntvm tune net.onnx --database net.tune --target aarch64 --rpc tracker:9190 --key rpi4b\n"
    "  bnntvm tune show net.tune --plot search.png\n"
    "  bnntvm tune merge net.tune other.tune --output all.tune",
)
def tune():
    """Measure schedules for the kernels of an ONNX file: bnntvm tune MODEL --database DIR. Options: bnntvm tune model --help."""


@tune.command("model", short_help="Tune an ONNX file (the word `model` may be left out).")
@click.argument("model", type=_MODEL)
@click.option(
    "--database",
    required=True,
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="Folder of records; a session goes on where the last one ended.",
)
@click.option("--trials", type=click.IntRange(0), default=1000, show_default=True, help="Candidates to measure, earlier sessions counted.")
@click.option("--target", default="x86", show_default=True, help="x86 (this machine), cuda (its GPU), or a level of `bnntvm targets`.")
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads that kernels run on while they are measured."
)
@click.option("--time-limit", metavar="TIME", help="For the whole session, for example 90s, 30m or 2h; it ends a second or two later.")
@click.option("--layers", multiple=True, metavar="NAME", help="Only kernels or layers in whose name this occurs.")
@click.option("--rpc", metavar="HOST:PORT", help="Measure on the boards of this RPC tracker.")
@click.option("--key", help="The key under which the boards are registered.")
@click.option("--weight-tolerance", type=click.FloatRange(0), default=0.0, help="As for build.")
@click.option("--assume-nonzero", is_flag=True, help="As for build.")
def tune_model(model, time_limit, layers, **options):
    """Measure schedules for the kernels of MODEL. Ctrl-C ends the session; what was measured is kept."""
    result = bnntvm.tune(str(model), time_limit=_seconds(time_limit), layers=list(layers) or None, **options)
    if result.damaged:
        click.echo(f"{result.damaged} damaged lines of the database were moved to *.damaged files; everything else counts")
    if not result.rows:
        click.echo("this network has no kernel that has schedules")
        return
    rate = (result.measured + result.failed) / max(result.seconds, 1e-9)
    click.echo(
        f"{result.measured} candidates measured and {result.failed} failed in {result.seconds:.0f} s, {rate:.1f} a second; "
        f"kernels {result.gain:.3f} times as fast as by default" + (f" ({result.interrupted})" if result.interrupted else "")
    )
    if result.remark:
        click.echo(result.remark)
    if result.noisy:
        click.echo(
            f"the machine was too busy to judge {_some(result.noisy)}: what was used before stays; end what else runs there, and tune "
            "again: only the comparison is repeated"
        )
    if result.uncompared:
        click.echo(f"not compared with the default yet, so no gain is claimed: {_some(result.uncompared)}; tuning again makes up for it")
    _show(options["database"], None)


def _some(names):
    return f"{len(names)} kernel{'s' * (len(names) > 1)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"


@tune.command("show", short_help="What a database of records says.")
@click.argument("database", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@click.option(
    "--plot", "picture", type=click.Path(dir_okay=False, path_type=pathlib.Path), help="Write a picture (.png, .svg) of the search."
)
def tune_show(database, picture):
    """Show the best schedule of every task in DATABASE, and its gain."""
    from bnntvm.tuning import records

    if not (database / records.RECORDS).exists():
        raise records.no_records(database)
    _show(database, picture)


@tune.command("merge", short_help="Records of several databases in one.")
@click.argument("databases", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=pathlib.Path), help="Folder to write [default: the first one].")
def tune_merge(databases, output):
    """Merge DATABASES."""
    from bnntvm.tuning import records

    output = output or databases[0]
    damage = [line for folder in dict.fromkeys((*databases, output)) for line in records.damage(folder)]
    count, _ = records.merge(databases, output)
    click.echo("\n".join([f"{output}: {count} records", *damage]))


@main.command("rpc-server", short_help="Serve as a board.", epilog="\b\nExample:\n  bnntvm rpc-server --tracker desk:9190 --key rpi4b")
@click.option("--tracker", required=True, metavar="HOST:PORT", help="The RPC tracker: python -m tvm.exec.rpc_tracker --port 9190")
@click.option("--key", required=True, help="Name of this kind of board.")
@click.option("--host", default="0.0.0.0", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 64000), default=9090, show_default=True, help="The first port to try.")
@click.option("--address", help="Address under which others reach this board, if it is not the one the tracker sees.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of a kernel.")
@click.option("--silent", is_flag=True, help="Log errors only.")
def rpc_server(tracker, key, **options):
    """Run networks, and measure kernels, for others until killed. Whoever reaches this port can run code here: trusted networks only.

    A board needs neither a compiler nor ONNX: Python, numpy, click, apache-tvm (of which only the runtime is loaded) and bnntvm.
    """
    from bnntvm.remote import client, server

    server.serve(client.parse_address(tracker), key, **options)


@main.command(
    short_help="A folder to run a network from C or C++.",
    epilog="\b\nExample:\n  bnntvm package quicknet.onnx --target aarch64 -o bundle",
)
@click.argument("model", type=_MODEL)
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=pathlib.Path), required=True, help="Folder to make.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Size of dynamic dimensions.")
@click.option("--runtime/--no-runtime", default=True, show_default=True, help="With TVM's runtime libraries for the target.")
@_build_options
def package(model, output, batch, runtime, **options):
    """Put MODEL, an artefact or an ONNX file, into a folder with TVM's runtime, interfaces for C and Python, and examples.

    For armv7, for which there is no runtime, an ONNX file becomes standalone C behind the same interfaces.
    """
    from bnntvm import artefact
    from bnntvm import package as bundles
    from bnntvm.targets import registry

    isa = registry.resolve(options["target"])
    if artefact.is_artefact(model):
        bundles.package(model, output, batch, runtime)
    elif isa is not None and not bundles.has_runtime(isa):
        bundles.refuse_gpus(isa)
        if options["verify"]:
            raise click.UsageError(f"--verify looks at compiled kernels, and a bundle for {isa.name} is standalone C: leave it out")
        with _progress(f"writing {model} as C for {isa.name}"):
            chosen = {name: options[name] for name in ("assume_nonzero", "weight_tolerance")}
            bundles.package_c(str(model), output, isa.name, batch, **chosen)
    else:
        _package_built(model, output, batch, runtime, options)
    files = [p for p in output.rglob("*") if p.is_file()]
    click.echo(f"{output}: {len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB")


def _package_built(model, output, batch, runtime, options):
    import tempfile

    from bnntvm import package as bundles

    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch, "network.bnn")
        _build(model, options).export(path)
        bundles.package(path, output, batch, runtime)


@main.command(
    "export-c",
    short_help="Portable C99 that needs no library, for microcontrollers.",
    epilog="\b\nExamples:\n  bnntvm export-c net.onnx -o net\n  make -C net check          # run the example here\n"
    "  make -C net check-m4       # on a Cortex-M4 under QEMU",
)
@click.argument("model", type=_MODEL)
@click.option("-o", "--output", required=True, type=click.Path(file_okay=False, path_type=pathlib.Path), help="Folder to write.")
@click.option("--name", default="model", show_default=True, help="Prefix of files, functions and macros.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Size of dynamic dimensions.")
@click.option("--vectors/--no-vectors", default=True, help="Evaluate the network once, so that the example checks itself.")
@click.option("--weight-tolerance", type=click.FloatRange(0), default=0.0, help="As for build.")
@click.option("--assume-nonzero", is_flag=True, help="As for build.")
def export_c(model, output, **options):
    """Write the ONNX file MODEL as C99 with static weights and one static workspace, an example and its Makefile; show what it takes."""
    with _progress(f"writing {model} as C"):
        sizes = bnntvm.export_c(str(model), output, **options)
    click.echo(sizes.summary())


@main.command(short_help="Instruction-set levels.")
def targets():
    """List the instruction-set levels, and which of them this machine can run."""
    import platform

    from bnntvm.targets import aarch64, armv7, cuda, x86
    from bnntvm.targets.isa import host_flags

    flags, best = host_flags(), x86.host_level()
    for level in (*x86.LEVELS, *aarch64.LEVELS, *armv7.LEVELS):
        missing = sorted(level.needs - flags)
        state = "no, lacks " + ", ".join(missing) if missing else "yes, what x86 means here" if level is best else "yes"
        if level.machine != platform.machine():
            state = "no, built for export"
        click.echo(f"{level.name:<20} {32 * level.lanes:>4} bit  popcount: {level.popcount:<8} this machine: {state}")
    here = cuda.device_arch()
    for level in cuda.LEVELS:
        bits = f"{level.operation} by {'wgmma' if level.wgmma else 'mma'}" if level.operation else "no"
        state = "yes, what cuda means here" if level.mcpu == here else "no, built for export" if here is None else f"no, its GPU is {here}"
        click.echo(f"{level.name:<20} GPU, tensor cores on bits: {bits:<12} this machine: {state}")
    click.echo("Processors: " + ", ".join([*aarch64.PROCESSORS, *armv7.PROCESSORS]) + ", and LLVM's names for x86.")


# ------------------------------------------------------------------------------------------------------------------- parts


def _seconds(text):
    """Seconds from 90, "90s", "30m" or "2h"."""
    if text is None:
        return None
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        seconds = float(text[:-1] if unit else text) * (unit or 1)
        if not seconds >= 0:
            raise ValueError
        return seconds
    except ValueError:
        raise click.UsageError(f"--time-limit {text}: a number of seconds, or one with s, m or h") from None


def _show(database, picture):
    from bnntvm.tuning import records, report

    summaries, _ = report.summarise(database)
    click.echo("\n".join([report.table(summaries) or f"{database}: nothing was measured yet", *records.damage(database)]))
    if picture:
        try:
            report.plot(summaries, picture)
        except ImportError as error:
            raise BnnError("a picture needs matplotlib", hint="pip install 'bnntvm[tune]'") from error
        click.echo(f"written to {picture}")


def _threads(module):
    return f"{module.threads} thread{'s' * (module.threads > 1)}"


@contextlib.contextmanager
def _progress(text):
    """A spinner with the time on standard error; one plain line where that is not a terminal."""
    if not sys.stderr.isatty():
        click.echo(text, err=True)
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=Console(stderr=True), transient=True
    ) as progress:
        progress.add_task(text.replace("[", "\\["))
        yield


def _build(model, options):
    for folder in options.get("tuning") or ():
        from bnntvm.tuning import records

        for line in records.damage(folder):
            click.echo(f"warning: {line}", err=True)
    with _progress(f"building {model} for {options['target']}"):
        return bnntvm.build(str(model), **options | {"tuning": list(options.get("tuning") or ()) or None})


def _open(model, options):
    """A module from an artefact or an ONNX file; by content, except that a file called .bnn is never taken for ONNX."""
    from bnntvm import artefact

    if model.suffix == ".bnn" or artefact.is_artefact(model):
        return bnntvm.load(model, threads=options["threads"])
    return _build(model, options)


def _module(model, options):
    """A module that this machine need not be able to run."""
    from bnntvm import artefact
    from bnntvm.module import Module

    if model.suffix == ".bnn" or artefact.is_artefact(model):
        file, manifest, length = artefact.read(model, to_run=False)
        return Module(file, manifest, length, options["threads"])
    return _build(model, options)


def _open_there(model, options, rpc, key):
    """A module on the board that --rpc and --key name, or as :func:`_open`."""
    if not rpc:
        return _open(model, options)
    board = bnntvm.connect(rpc, key)  # before a build: whether there is one
    return board.load(_module(model, options))


def _read_inputs(module, inputs):
    """``NAME=FILE`` options as a feed."""
    import numpy as np

    feed = {}
    for text in inputs:
        name, separator, path = text.partition("=")
        if not separator or pathlib.Path(text).exists():
            if len(module.inputs) != 1:
                raise click.UsageError(f"--input {text}: which input? The network has " + ", ".join(info.name for info in module.inputs))
            name, path = module.inputs[0].name, text
        try:
            feed[name] = np.load(path, allow_pickle=False)
            if not isinstance(feed[name], np.ndarray):
                raise ValueError("it is an archive of arrays (.npz)")
        except (OSError, ValueError) as error:
            raise InputError(
                f"the file for input {name!r} could not be read", where=path, why=str(error), hint="give a .npy file"
            ) from error
    return feed


def _store(outputs, folder):
    """Write every output to ``folder``; returns output name -> path. Characters of a name that cannot be in a file name are replaced."""
    import numpy as np

    files = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in outputs.items():
            stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in name).lstrip(".") or "output"
            while folder / f"{stem}.npy" in files.values():
                stem += "_"
            files[name] = folder / f"{stem}.npy"
            np.save(files[name], array)
    except OSError as error:
        raise BnnError("the outputs could not be written", where=str(folder), why=error.strerror or str(error)) from error
    return files


def _summary(array):
    """The whole of a small array, the range of a large one."""

    def text(value):
        return f"{value:.6g}" if array.dtype.kind == "f" else str(value)

    if array.size <= 10:
        return "".join(f" {text(value)}" for value in array.ravel().tolist())
    return f" from {text(array.min())} to {text(array.max())}"


def _onnxruntime(path, feed, threads):
    """A function that runs the ONNX file once in ONNX Runtime, on as many threads."""
    try:
        import onnxruntime
    except ImportError as error:
        raise BnnError("ONNX Runtime is not installed", hint="pip install onnxruntime, or leave --compare out") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(None, feed)
    except Exception as error:  # its errors have no common base
        raise BnnError("ONNX Runtime cannot run this model", where=str(path), why=str(error).splitlines()[0]) from error
    return lambda: session.run(None, feed)
