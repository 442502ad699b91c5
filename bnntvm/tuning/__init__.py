"""Autotuning: schedules that were measured instead of guessed, see :func:`bnntvm.tune`.

tasks      what there is to tune in a network; task is one kernel; workload says what a task is called
space      a family's schedules as a MetaSchedule design space
features   what MetaSchedule's XGBoost cost model sees of a candidate
search     which candidates come next (a MetaSchedule search strategy)
measure    building and measuring on two cores (MetaSchedule's builder and runner); rpc on boards (bnntvm.remote); gpu on a GPU, by
           gpu_program in a process of its own (gpu_process); gpu_features
worker     what the processes do; cases are the data they do it on, surroundings the memory and the caches
turns      what a comparison in turns says, on machines that do other things, too
in_network the last comparison, within the network; stage is the program that runs it with other kernels
driver     a session: profile, search, final comparison
records    the database on disk as builds read it; store as a session writes it; report as people read it
"""
