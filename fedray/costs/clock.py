"""The clock and the meter of a simulated device: seconds and joules of an exchange, and its memory."""

from dataclasses import replace

from fedray.types import Cost, DeviceProfile


def seconds(cost: Cost, device: DeviceProfile) -> float:
    """Return the seconds of one exchange on the device's clock: link and computing; nothing overlaps.

    Of `cost`, only `bytes_down`, `steps`, `executed_flops` and `bytes_up` are read.
    """
    return (
        device.latency_s
        + cost.bytes_down / device.downlink_bytes_per_s
        + computing_s(cost, device)
        + cost.bytes_up / device.uplink_bytes_per_s
    )


def computing_s(cost: Cost, device: DeviceProfile) -> float:
    """Return the seconds in which a device computes: of an exchange, of each step, and of the FLOPs."""
    return device.round_s + cost.steps * device.step_s + cost.executed_flops / device.flops_per_s


def joules(cost: Cost, device: DeviceProfile) -> float:
    """Return the energy of one exchange in J: computing, idling while bytes travel, and the bytes.

    What the device draws while it waits for others, or for the next round, is not the exchange's.
    """
    computing = computing_s(cost, device)
    return (
        device.compute_w * computing
        + device.idle_w * (seconds(cost, device) - computing)
        + device.down_j_per_byte * cost.bytes_down
        + device.up_j_per_byte * cost.bytes_up
    )


def at_home(cost: Cost, device: DeviceProfile) -> Cost:
    """Return a cost with its seconds and joules on a device that computes for itself, without an exchange."""
    computing = cost.steps * device.step_s + cost.executed_flops / device.flops_per_s
    return replace(cost, seconds=computing, energy_j=device.compute_w * computing)


def clocked(cost: Cost, device: DeviceProfile) -> Cost:
    """Return a cost with the seconds and the joules that it takes on a device."""
    return replace(cost, seconds=seconds(cost, device), energy_j=joules(cost, device))


def training_memory_bytes(num_params: int) -> int:
    """Return what training holds at least: weights, gradients, momentum and the update, in float32.

    Activations are left out, since they depend on batch and layers.
    """
    return 4 * 4 * num_params


def fits(device: DeviceProfile, num_params: int) -> bool:
    """Tell whether a device has the memory to train a model of this many parameters."""
    return training_memory_bytes(num_params) <= device.memory_bytes
