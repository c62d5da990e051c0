"""What an update costs: `kfacrnn bench`.

    step-cost   every optimiser on a task, interleaved step by step in one process
    lstm        the recurrent layers against `torch.nn.LSTM`
    dnc         the DNC's update, and that of the package `dnc` from PyPI
    scaling     the same costs over sizes of model and batch
    ranks       one process and two: milliseconds, messages, memory, and rates for the cost model
    memory      bytes of state, and the peak of a process that trains
    experiment  the costs of an experiment's lines

`arguments` is the command line, `cycle` holds the arithmetic, `subjects` what can be timed, `report` the files. What an
update would cost on more ranks: `sharing` counts volumes, `cost_model` makes seconds of them, `calibration` finds a
machine's rates in what `ranks` and `primitives` measured. Every other module is one command. None of them changes what
is measured: a step is `Session.step`, with a stopwatch around the methods that it calls.
"""
