"""One pass of a network in which tensors of modules are read, each as the module returned it.

    tensors_at   network, inputs, whole sites -> tensors
    hook_site    pass everything that a module returns, or is given, through a function

A network may write into a tensor after its module has returned it. The first passes find out which
tensors, by their counts of writes, and only these are copied in later ones.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from mechatlas.activations.networks import call_network
from mechatlas.activations.passes import is_aside
from mechatlas.activations.values import tensor_of, tensors_in
from mechatlas.base import Site, SiteError, UserError


class _Reached(BaseException):
    """Signal that stops a forward pass at the last site; never leaves this module.

    It is no `Exception`, since networks may catch those.
    """


@dataclasses.dataclass
class _Habits:
    """Observations on a network, by which later passes stop early and copy little."""

    n_calls: "WeakKeyDictionary[nn.Module, int]" = dataclasses.field(
        default_factory=WeakKeyDictionary
    )
    """Number of calls in one pass of the modules that were counted."""
    written: set[Site] = dataclasses.field(default_factory=set)
    """Whole sites whose tensors the network writes in place later in the pass."""


_habits: "WeakKeyDictionary[nn.Module, _Habits]" = WeakKeyDictionary()


def tensors_at(root: nn.Module, inputs: Any, sites: list[Site]) -> dict[Site, Tensor]:
    """Tensors at whole sites, as their modules returned them.

    Args:
        root: Network, without wrappers, outside of inference mode.
        inputs: Batch of inputs; left as they are.
        sites: Sites without branches.

    Raises:
        SiteError: A site is not reached, or its module is called several times.
    """
    habits = _habits.setdefault(root, _Habits())
    random = torch.get_rng_state()
    while True:
        reading = _Pass(root, sites, habits)
        reading.run(inputs)
        written = reading.written()
        if not written:
            return {site: kept.tensor for site, kept in reading.kept.items()}
        habits.written |= written
        torch.set_rng_state(random)


class _Kept:
    """Tensor of a site, and what it was like when the site was reached.

    Args:
        tensor: The tensor.
        copy: Whether the network is known to write into it.
        sample: Whether to keep some of its numbers, as writing through `.data` is not counted.
    """

    def __init__(self, tensor: Tensor, *, copy: bool, sample: bool) -> None:
        counted = not tensor.is_inference() and tensor.layout == torch.strided
        self.safe = copy or not counted or is_functorch_wrapped_tensor(tensor)
        self.tensor = tensor.clone() if self.safe else tensor
        self._mark = None if self.safe else self._state()
        self._sample = None if self.safe or not sample else self._numbers().clone()

    def _state(self) -> tuple[Any, ...]:
        t = self.tensor
        return t._version, t.data_ptr(), t.shape, t.stride()

    def _numbers(self) -> Tensor:
        flat = self.tensor.detach()
        for axis, length in enumerate(flat.shape):
            flat = flat.narrow(axis, 0, min(length, 16))
        return flat

    def is_written(self) -> bool:
        """Whether the tensor was changed since."""
        if self.safe:
            return False
        if self._mark != self._state():
            return True
        if self._sample is None:
            return False
        now, then = self._numbers(), self._sample
        return not bool(((now == then) | ((now != now) & (then != then))).all())


class _Pass:
    """Pass of a network in which whole sites are read.

    Args:
        root: Network, without wrappers.
        sites: Whole sites.
        habits: What is known of the network; added to.
    """

    def __init__(self, root: nn.Module, sites: list[Site], habits: _Habits) -> None:
        self.root, self.sites, self.habits = root, sites, habits
        self.kept: dict[Site, _Kept] = {}
        self.n_calls: Counter[Site] = Counter()
        modules = [root.get_submodule(site.module) for site in sites]
        self.is_first = any(module not in habits.n_calls for module in modules)
        for site, module in zip(sites, modules, strict=True):
            if site.call is None and habits.n_calls.get(module, 1) > 1:
                raise SiteError(several_calls(site))

    def run(self, inputs: Any) -> None:
        """Run the network.

        Raises:
            SiteError: A site is not reached, or its module is called several times.
            UserError: The network refuses the inputs.
        """
        with ExitStack() as hooks:
            for site in self.sites:
                keep = functools.partial(self._keep, site)
                hooks.callback(hook_site(self.root, site, keep).remove)
            if isinstance(inputs, Mapping):
                inputs = dict(inputs)
            try:
                call_network(self.root, tree_map_only(Tensor, torch.clone, inputs))
            except _Reached:
                return
            except UserError:
                raise
            except Exception:
                if len(self.kept) < len(self.sites):
                    raise
                return  # behind the last site, where no other pass gets
        missing = [site for site in self.sites if site not in self.kept]
        if missing:
            raise SiteError(never_called(missing, self.n_calls))
        for site in self.sites:
            self.habits.n_calls[self.root.get_submodule(site.module)] = self.n_calls[site]

    def _keep(self, site: Site, value: Any) -> Any:
        self.n_calls[site] += 1
        number = self.n_calls[site]
        if number == (site.call or 1):
            copy = site in self.habits.written
            self.kept[site] = _Kept(tensor_of(value, site), copy=copy, sample=self.is_first)
        elif site.call is None:
            raise SiteError(several_calls(site))
        if len(self.kept) == len(self.sites) and not self.is_first:
            raise _Reached
        return value

    def written(self) -> set[Site]:
        """Sites whose tensors the network wrote into after they were reached."""
        return {site for site, kept in self.kept.items() if kept.is_written()}


def several_calls(site: Site) -> str:
    """Sentence that refuses a site without a call, of a module that is called several times."""
    first, second = (dataclasses.replace(site, call=n) for n in (1, 2))
    return (
        f"Module {site.module!r} is called several times in one pass; name a call: {first}, "
        f"{second}, ..."
    )


def never_called(sites: Sequence[Site], n_calls: Mapping[Site, int]) -> str:
    """Sentence that refuses sites whose call never came in a pass.

    Args:
        sites: Sites that were not reached.
        n_calls: Number of calls of the modules of sites.
    """
    called = {site: n for site in sites if (n := n_calls.get(site, 0))}
    if called:
        site, n = next(iter(called.items()))
        return f"The network calls {site.module!r} {n} time(s) in one pass; there is no {site}."
    names = ", ".join(map(str, sites))
    return f"The network ran without calling the module of: {names}."


def hook_site(
    network: nn.Module, site: Site, change: Callable[[Any], Any], *, aside: bool = False
) -> RemovableHandle:
    """Pass everything that the module of a site returns, or is given, through a function.

    Args:
        network: Network, without wrappers.
        site: Site; its call, axes and branch are left out of account.
        change: Function from what is passed on to what is passed on instead.
        aside: Whether for passes that the user did not ask for, or for all others.

    Raises:
        SiteError: The module is scripted, and calls no hooks.
    """
    module = network.get_submodule(site.module)
    if isinstance(module, torch.jit.ScriptModule):
        raise SiteError(
            f"Module {site.module!r} (site {site}) is scripted, and nothing inside it can be read "
            "or edited; give the network that it was made from."
        )
    if site.take == "output":
        return module.register_forward_hook(
            lambda _module, _args, output: change(output) if is_aside() == aside else output
        )

    def change_input(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if is_aside() != aside:
            return args, kwargs
        # The activation is the first argument with a tensor; some networks pass all by keyword.
        for i, value in enumerate(args):
            if next(tensors_in(value), None) is not None:
                return (*args[:i], change(value), *args[i + 1 :]), kwargs
        for name, value in kwargs.items():
            if next(tensors_in(value), None) is not None:
                return args, {**kwargs, name: change(value)}
        raise SiteError(f"Site {site} was given no tensor.")

    return module.register_forward_pre_hook(change_input, with_kwargs=True)
