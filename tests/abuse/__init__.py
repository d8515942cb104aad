"""Wrong and odd arguments for every public function and module, by the thousand.

``python -m tests.abuse --calls 60000`` makes that many calls, in child processes, and prints what
came of them; tests/project/test_abuse.py makes 2,000 with a fixed seed. What is called is looked up
in the package (:mod:`abuse.targets`), so that a new op is covered by itself, and a call is a
function of a seed and its number: ``--seed 7 --only 123`` makes one again. Nothing is written to
disk.

==============  ====================================================================================
values.py       odd numbers, words and objects, and what may be wrong with a tensor
right.py        right arguments by their names
targets.py      the public functions and modules
calls.py        a call: its arguments, both ways of a CPU, what is compared
outcomes.py     what a call came to, and whose error it is
child.py        many calls in one process, and the right ones before and after them
__main__.py     the processes, and the table
==============  ====================================================================================
"""
