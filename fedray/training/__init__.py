"""How a device trains one model: a flat vector, the module that reads from it, steps and evaluations."""
