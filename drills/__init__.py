"""Drills: what may befall a run, done to it on purpose, again and again.

With files of strangers: `plans`, `adapters`, `recipes`, `runs`.
With a training: `kills`, `checkpoints`, `disks`, `numbers`.

`make drill` runs them all and prints what was tried, survived and lost; each takes a seed and a number of cases, so
that the tests run a few cases of each. A drill is a module of this package with a function `drill(seed, cases)`.
"""
