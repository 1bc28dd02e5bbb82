"""COSTS: the bytes of a payload, the FLOPs of a model under a mask, the seconds of a device."""
