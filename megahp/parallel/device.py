"""The device that a rank computes on."""

import torch

from megahp.config import Config
from megahp.errors import UserError
from megahp.launch import World, has_own_device


def uses_cuda(config: Config) -> bool:
    """Whether this run computes on CUDA devices."""
    return config.train.device == "cuda" or (config.train.device == "auto" and torch.cuda.is_available())


def check_devices(config: Config, ranks_here: int) -> None:
    """Raise UserError when this machine has fewer CUDA devices than the run would use on it."""
    devices = torch.cuda.device_count()
    if uses_cuda(config) and devices < ranks_here and not (devices == 1 and has_own_device()):
        raise UserError(
            f"train.device = {config.train.device!r} needs a CUDA device for each of {ranks_here} ranks and this "
            f"machine has {devices}; start fewer ranks, or set train.device=cpu"
        )


def device_of(config: Config, place: World) -> torch.device:
    """This rank's device. Ranks on CPUs share the machine's cores between them."""
    if uses_cuda(config):
        number = 0 if torch.cuda.device_count() == 1 and has_own_device() else place.local_rank
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    torch.set_num_threads(max(1, torch.get_num_threads() // place.local_size))
    return torch.device("cpu")
