"""The campaign of faults: runs are killed, disks filled, files damaged, and the end is compared with undisturbed runs.

process.py    starts pecobook as a process, forked from one that has imported everything
faults.py     kills such a process before its n-th file event, or lets its files fail
materials.py  images, masks, objects and small runs
subjects.py   what is disturbed: every stage, tokenize, analyze, reproduce and demo, and how two ends are compared
kills.py disks.py damages.py mistakes.py hostile.py processes.py    the cases
long.py       memory, open files and shared memory over a long time
__main__.py   draws cases until the time is over, and prints the table
"""
