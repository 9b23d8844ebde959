"""Distillation: other runs' models, on the layout of the run that learns from them."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from megahp import checkpoint
from megahp.config import ComputeConfig, Config, with_values
from megahp.model.build import build_model
from megahp.model.transformer import Transformer
from megahp.parallel import data as data_parallel
from megahp.parallel.cross_entropy import Teachers
from megahp.parallel.mesh import Mesh
from megahp.parallel.parameters import model_state


class TeacherModels:
    """The models of distill.teachers, which `prepare.with_teachers` has checked, in the run's own precision. They stay
    as they are: they have no moments and no gradients."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.weight = config.distill.weight
        self.models = [load_teacher(name, config, mesh) for name in config.distill.teachers]

    @torch.no_grad()
    def predict(self, inputs: Mapping[str, Tensor]) -> Teachers:
        """Return what a microbatch's loss needs of the teachers' predictions. inputs: this rank's, of the model.

        Their unembeddings stay gathered until the next microbatch: the backward pass computes with them again.
        """
        x, rows = [], []
        for model in self.models:
            data_parallel.reshard(model)
            x.append(model(inputs["x"], documents=inputs.get("documents"), unembed=False))
            data_parallel.unshard(model)
            rows.append(model.unembedding_rows.detach())
        caps = [model.model.logits_softcap for model in self.models]
        return Teachers(self.weight, self.models[0].model.vocab_size, x, rows, caps)


def load_teacher(name: str, config: Config, mesh: Mesh) -> Transformer:
    """Load the model of a checkpoint. Its shape and parameterization are its own, all else is the run's."""
    path = checkpoint.find(checkpoint.location(name))
    # zero 3 frees a block's weights after its forward pass, which is the only one
    parallel = replace(config.parallel, zero=3, prefetch=0, reduce="once")
    saved = replace(checkpoint.settings_of(path), parallel=parallel, compute=ComputeConfig())
    settings = {"train.dtype": config.train.dtype, "train.noise_scale": False}
    (model,) = build_model(with_values(saved, settings), mesh).stages.values()
    checkpoint.load(path, model_state(model))
    return model
