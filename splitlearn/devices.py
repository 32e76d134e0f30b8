"""Devices and radios: what computes and what sends, as the few constants that the cost model asks for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

__all__ = ["DEVICES", "RADIOS", "Device", "Radio"]


@dataclass(frozen=True, kw_only=True)
class Device:
    """What computes; all rates are effective ones, not peaks. ``ValueError`` where one is not finite and positive.

    ``convolution`` and ``linear`` are FLOP/s in convolutions and in other matrix products (a multiply-add is two),
    ``moved`` bytes/s of memory traffic, ``overhead`` seconds an operation, ``memory`` bytes. ``factors`` refine that
    where the device was measured: how many times what the plain constant says a unit of work costs, by the names of
    ``splitlearn.cost.units``. ``modelled`` is False only where the rates were measured on the present machine.
    """

    name: str
    convolution: float
    linear: float
    moved: float
    overhead: float
    watts: float  # drawn while it computes
    idle_watts: float  # while it waits
    memory: int
    source: str  # where each constant is from
    modelled: bool = True
    factors: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("convolution", "linear", "moved"):
            if not (getattr(self, name) > 0 and isfinite(getattr(self, name))):
                raise ValueError(f"expected a finite rate {name} > 0 a second, got {getattr(self, name)}")
        for name in ("overhead", "watts", "idle_watts", "memory"):
            if not (getattr(self, name) >= 0 and isfinite(getattr(self, name))):
                raise ValueError(f"expected a finite {name} ≥ 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Radio:
    """What a device's end of a network draws on top of its idle power: (base + up · rate) watts while it sends.

    ``up`` and ``down`` are W per bit/s, so joules a bit; ``base`` is W while it is active.
    """

    up: float
    down: float
    base: float
    source: str

    def __post_init__(self) -> None:
        for name in ("up", "down", "base"):
            if not (getattr(self, name) >= 0 and isfinite(getattr(self, name))):
                raise ValueError(f"expected a finite {name} ≥ 0, got {getattr(self, name)}")


# Orders of magnitude for devices of each class. A rate is peak × an assumed utilisation, since what a framework reaches
# on small models is seldom published; to know a device, measure it (splitlearn.calibration) where it stands.
DEVICES = {
    device.name: device
    for device in (
        Device(
            name="microcontroller",
            convolution=60e6,
            linear=60e6,
            moved=200e6,
            overhead=5e-6,
            watts=0.4,
            idle_watts=0.15,
            memory=320 * 1024,
            source="STM32F746 (Cortex-M7, 216 MHz, 320 KiB of RAM; datasheet): peak one float32 multiply-add a cycle, "
            "432 MFLOP/s, of which 14 % assumed. For int8, CMSIS-NN (Lai et al. 2018, arXiv:1801.06601) reports "
            "CIFAR-10 at 10.1 images/s, some 0.25 GOp/s, on this chip. Bandwidth, overhead and both powers assumed",
        ),
        Device(
            name="raspberry_pi",
            convolution=8e9,
            linear=8e9,
            moved=3e9,
            overhead=30e-6,
            watts=5.0,
            idle_watts=2.5,
            memory=4 * 2**30,
            source="Raspberry Pi 4, four Cortex-A72: about 8 GFLOP/s in float64 Linpack (Feiereisen 2022, 64-bit OS), "
            "so some 16 in float32, of which half assumed; 2.5 W idle and 5 W with four busy cores as published "
            "measurements have it. Bandwidth (of a peak of 12.8 GB/s) and overhead assumed",
        ),
        Device(
            name="phone",
            convolution=30e9,
            linear=30e9,
            moved=8e9,
            overhead=15e-6,
            watts=4.0,
            idle_watts=0.5,
            memory=6 * 2**30,
            source="assumed: four large Cortex-A7x cores at 2.4 GHz, peak 4 × 16 FLOP × 2.4 GHz = 154 GFLOP/s, of "
            "which a fifth; bandwidth, overhead and powers assumed, with the screen off",
        ),
        Device(
            name="laptop",
            convolution=150e9,
            linear=150e9,
            moved=15e9,
            overhead=8e-6,
            watts=28.0,
            idle_watts=5.0,
            memory=16 * 2**30,
            source="assumed: four AVX2 cores at 3 GHz, peak 4 × 32 FLOP × 3 GHz = 384 GFLOP/s, of which 40 %; 28 W is "
            "the usual power limit of such a processor; bandwidth, overhead and idle power assumed",
        ),
        Device(
            name="server_gpu",
            convolution=7.8e12,
            linear=11.7e12,
            moved=1.4e12,
            overhead=10e-6,
            watts=400.0,
            idle_watts=50.0,
            memory=80 * 10**9,
            source="NVIDIA A100 80 GB SXM (datasheet): 19.5 TFLOP/s in float32 without tensor cores, 2,039 GB/s, 400 W;"
            " of that 40 % in convolutions, 60 % in products and 70 % of the bandwidth assumed. 10 µs an operation "
            "is what an eager framework takes to launch one, assumed; idle power assumed",
        ),
    )
}

HUANG = 'Huang et al. 2012 (MobiSys), "A close examination of performance and power characteristics of 4G LTE networks"'

# By the names of splitlearn.network.PROFILES. A milliwatt per Mbit/s is a nanojoule a bit.
RADIOS = {
    "lan": Radio(up=0.0, down=0.0, base=0.5, source="assumed: a gigabit Ethernet port, whatever it carries"),
    "wifi": Radio(up=283.17e-9, down=137.01e-9, base=0.13286, source=f"{HUANG}: its 802.11 phone of 2012"),
    "4g": Radio(up=438.39e-9, down=51.97e-9, base=1.28804, source=f"{HUANG}: its LTE phone; without the tail"),
    "5g": Radio(
        up=150e-9,
        down=20e-9,
        base=1.6,
        source="assumed: a third of LTE's energy a bit, a quarter more base power; measurements (Narayanan et al. "
        "2021, SIGCOMM) find 5G cheaper a bit at high rates and dearer at low ones",
    ),
    "satellite": Radio(
        up=0.0,
        down=0.0,
        base=40.0,
        source="assumed: a small terminal with its dish, which draws tens of watts whatever it carries",
    ),
}
