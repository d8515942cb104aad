"""tridrop.swap: finds what drops in a model, replaces it in place, and reports on it."""

from __future__ import annotations

from torch import nn

from ..base.arguments import check_flags, check_module
from ..base.modules import all_modules
from ..contract.seeds import number_sites
from . import classes, found, kinds
from .encoders import TWINS, has_path, note_twins
from .interfaces import Interfaces, restore_attention
from .keras_calls import GRAPH, MARK
from .keras_models import Layers
from .kinds import base_of
from .modules import REPLACEMENTS
from .report import Report
from .rewrite import Levels
from .survey import Survey


def swap(
    model: nn.Module,
    *,
    dropout: bool = True,
    attention: bool = True,
    inside: bool = True,
    across: bool = True,
    memory: bool = False,
    dry_run: bool = False,
) -> Report:
    """Rewrite a model in place so that its dropouts are tridrop's, and fused where possible.

    Parameters, state_dict keys, hooks, names of classes, isinstance checks, pickling, gradient
    checkpointing and the results in eval mode stay what they were. Masks are tridrop's. They are
    numbered for :func:`tridrop.rng`, and do not depend on the switches below; a fused op rounds
    once. Whatever is not certain is left as it is, and the report says why. Swap before
    fully_shard, and before a trainer wraps the model. A second call replaces the first.

    Args:
        model: any module: of torch.nn, transformers, timm, peft, or your own.
        dropout: replace dropouts and drop paths, including those that cannot be fused.
        attention: run attention with dropout in memory linear in the sequence lengths.
        inside: fuse a dropout with its neighbours in the same forward: the bias of the linear
            layer, the activation, the residual and the norm around it.
        across: fuse across the ends of forwards, and with drop paths, layer scales, and sums that
            have several users.
        memory: let linear layers not keep an input that is an activation, dropped or not, or the
            result of a norm. Backward recomputes it from tensors that are kept anyway, in one
            elementwise pass each. Under torch.compile, its partitioner decides what is kept.
        dry_run: only report, and change nothing.

    Returns:
        A :class:`Report`. Print it, or use its ``verify``, ``source`` and ``to_dict``.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: for the same reason as :func:`unswap`.

    >>> model = nn.TransformerEncoderLayer(8, 2, 16)
    >>> swap(model).counts()
    {'fused': 4, 'swapped': 0, 'left': 0}
    """
    check_module(model)
    check_flags(
        dropout=dropout, attention=attention, inside=inside, across=across, memory=memory,
        dry_run=dry_run,
    )  # fmt: skip
    levels = Levels(dropout, attention, inside, across, memory)
    if not dry_run:
        unswap(model)
    survey = Survey(model, levels)
    interfaces = Interfaces(survey)
    layers = Layers(model, levels)
    if not dry_run:
        _apply(survey, interfaces)
        layers.apply()
        layers.number()
        _number(model, survey)
    sites = [*found.sites_of(model, survey, interfaces), *layers.sites()]
    read = survey.read()
    for more in (interfaces.read(), layers.read()):
        for name, each in more.items():
            read.setdefault(name, []).extend(each)
    return Report(
        sites, levels, dry_run, model, certain=found.is_certain(model),
        remade=survey.remade() if memory else {}, read=read,
    )  # fmt: skip


def _apply(survey: Survey, interfaces: Interfaces) -> None:
    for module, recipe in survey.recipes.items():
        base = base_of(module)
        kind = kinds.kind_of(module)
        drops_samples = kind is not None and kind.name == "drop_path"
        changes = survey.levels.dropout if drops_samples else survey.work(module).changes()
        if changes or has_path(base):
            module.__class__ = classes.swapped_class(base, recipe)
            note_twins(module)
    for module in survey.names:
        if type(module) in REPLACEMENTS and survey.replaces(module):
            module.__class__ = REPLACEMENTS[type(module)]
    interfaces.apply()


def _number(model: nn.Module, survey: Survey) -> None:
    """Number every site, whatever became of it, so that numbers do not depend on the switches."""
    for module in survey.names:
        places = survey.work(module).places if module in survey.recipes else []
        count = len(places)
        if survey.drops(module) and not hasattr(module, "site"):
            count += 1
        if count:
            module.__dict__["_tridrop_count"] = count
        for i, (_, place) in enumerate(places):
            if place.op.name == "interface":
                module.__dict__["_tridrop_attention_site"] = i
    number_sites(model)
    for module, users in survey.places.items():
        # A dropout module whose rate is passed to an attention function may still be called, by an
        # attention function that is not tridrop's. It then draws with the number of that place.
        given = [u for u in users if survey.work(u[0]).places[u[1]][1].op.name == "interface"]
        name = "site" if "site" in module.__dict__ else "_tridrop_site"  # a library's drop path
        if name in module.__dict__ and (given or len(users) == 1):
            owner, i = (given or users)[0]
            module.__dict__[name] = owner.__dict__["_tridrop_site"] + i


# What a swap, and tridrop's classes for Keras layers, put into the __dict__ of a module.
_LEFT_IN = (
    *TWINS,
    "_tridrop_site",
    "_tridrop_count",
    "_tridrop_attention_site",
    "__tridrop_seed_state",
    MARK,
    GRAPH,
)


def unswap(model: nn.Module) -> None:
    """Undo :func:`swap`: every module gets its original class and attention function back.

    A model that is not swapped stays as it is. Raises RuntimeError if a module was given another
    class after the swap.
    """
    check_module(model)
    for module in all_modules(model):  # check all of them before changing anything
        inherited = any("_tridrop_base" in c.__dict__ for c in type(module).__mro__)
        if inherited and not classes.is_swapped(module):
            raise RuntimeError(
                f"a {type(module).__name__} was given another class after the swap, for instance "
                "by fully_shard: call tridrop.unswap before that"
            )
    for module in all_modules(model):
        if classes.is_swapped(module):
            module.__class__ = type(module).__dict__["_tridrop_base"]
        for name in _LEFT_IN:
            module.__dict__.pop(name, None)
        if not hasattr(type(module), "site"):
            module.__dict__.pop("site", None)
        restore_attention(module)
