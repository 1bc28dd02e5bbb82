"""Training of agents that choose the pruning rate, with RLlib.

The decision processes live in `fedray.policies`, so that training and deployment step the same object. This
package imports fedray; fedray never imports this package.
"""
