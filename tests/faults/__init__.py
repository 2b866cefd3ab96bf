"""The suite of faults: processes that are killed, disks that are full, files that are damaged, inputs that are nonsense.

    make test-faults     the whole suite; its counts go to `results.json`
    test_faults.py       a short part of it, among the other tests

commands    the commands that write, on tiny inputs         kills     SIGKILL at random times
disks       full and read-only folders                      damage    files that are cut, empty or of another
inputs      generated inputs for all readers
"""
