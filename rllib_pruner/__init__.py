"""Training of agents that choose how much to prune, with RLlib.

The decision processes are in `fedray.policies`: a training and a run step the same objects. This package
imports fedray; in fedray, only the command line imports this package.
"""
