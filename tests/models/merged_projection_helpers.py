"""Products, groups and storages of merged projections, for their tests."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_kernels.models.merged_projections import GROUPS
from tests.models.test_families import IDS

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


class Products(TorchDispatchMode):
    """Counts matrix products with weights."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in PRODUCTS
        return function(*args, **(kwargs or {}))


def groups_of(model):
    """(modules of a group, by order) for every group in a model."""
    for parent in model.modules():
        for names in GROUPS:
            if all(hasattr(parent, name) for name in names):
                yield tuple(getattr(parent, name) for name in names)


def is_one_storage(group) -> bool:
    kinds = [[module.weight for module in group]]
    if group[0].bias is not None:
        kinds.append([module.bias for module in group])
    return all(len({part.untyped_storage().data_ptr() for part in parts}) == 1 for parts in kinds)


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_alike(model, other) -> None:
    torch.testing.assert_close(logits(model), logits(other), atol=1e-4, rtol=1e-4)


def plain(module, x):
    return nn.functional.linear(x, module.weight, module.bias)


def compiled_layer(model, backend):
    """A call of the first decoder layer, always on the same input; backend None: not compiled."""
    layer = model.model.layers[0]
    x = torch.randn(2, 12, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    angles = model.model.rotary_emb(x, torch.arange(12)[None])
    run = torch.compile(layer, fullgraph=True, backend=backend) if backend else layer

    def call():
        with torch.no_grad():
            return run(x, position_embeddings=angles)

    return call
