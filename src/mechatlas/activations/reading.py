"""Passes of a network in which tensors of modules are read, each as the module returned it.

    Reader       whole sites of a network that are read together, pass by pass
    hook_module  pass everything that a module returns, or is given, through a function

A network may write into a tensor after its module has returned it, and into its inputs. The first
pass finds out which ones, and only these are copied later; counts of writes are watched always.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from mechatlas.activations.networks import call_network
from mechatlas.activations.passes import is_aside
from mechatlas.activations.values import tensor_of, tensors_in
from mechatlas.base import InputError, Site, SiteError, UserError


class _Reached(BaseException):
    """Signal that stops a forward pass at the last site; never leaves this module.

    It is no `Exception`, since networks may catch those.
    """


class Reader:
    """Reader of some sites of a network, which remembers what its passes have shown.

    Args:
        root: Network, without wrappers.
        sites: Sites; their branches are left out of account.
    """

    def __init__(self, root: nn.Module, sites: Iterable[Site]) -> None:
        self.sites = list(dict.fromkeys(whole(site) for site in sites))
        self._paths = [
            [(name, weakref.ref(module)) for name, module in _path(root, site)]
            for site in self.sites
        ]
        self.written: set[Site] = set()
        """Sites whose tensors the network writes in place later, or are in its inputs' memory."""
        self._copies_inputs: dict[Any, bool] = {}
        """Whether inputs are copied, by their form; known after a pass to the end."""

    def is_current(self, root: nn.Module) -> bool:
        """Whether the network still has the same modules on the way to each site."""
        for path in self._paths:
            module: Any = root
            for name, known in path:
                module = getattr(module, name, None)
                if module is None or module is not known():
                    return False
        return True

    def module(self, root: nn.Module, i: int) -> nn.Module:
        """Module of a site, by its number."""
        path = self._paths[i]
        return (path[-1][1]() if path else root) or root

    def around(self, root: nn.Module) -> list[nn.Module]:
        """Modules that those of the sites lie inside."""
        modules = (known() for path in self._paths for _, known in path[:-1])
        inside = [root] if any(self._paths) else []
        return [*inside, *(module for module in modules if module is not None)]

    def tensors(self, root: nn.Module, inputs: Any) -> dict[Site, Tensor]:
        """Tensors at the whole sites, as their modules returned them.

        Args:
            root: The network, outside of inference mode.
            inputs: Batch of inputs; left as they are.

        Raises:
            SiteError: A site is not reached, or its module is called several times.
            InputError: The network wrote into the inputs, unlike in its first pass.
        """
        given_tensors = [inputs] if isinstance(inputs, Tensor) else list(tensors_in(inputs))
        form = _form(given_tensors)
        random = torch.get_rng_state()
        while True:
            copies = self._copies_inputs.get(form)
            reading = _Pass(self, is_first=copies is None)
            if copies is False:
                before = [tensor._version for tensor in given_tensors]
                reading.run(root, inputs)
                if before != [tensor._version for tensor in given_tensors]:
                    self._copies_inputs[form] = True
                    raise InputError(_CHANGED)
            else:
                given = tree_map_only(Tensor, torch.clone, inputs)
                watched = [_Kept(t, copy=False, sample=True) for t in tensors_in(given)]
                if reading.run(root, given) and copies is None:
                    safe = form is None or any(kept.safe or kept.is_written() for kept in watched)
                    self._copies_inputs[form] = safe
                    self.written |= set() if safe else reading.within(watched)
            written = {site for site, kept in reading.kept.items() if kept.is_written()}
            if not written:
                return {site: kept.tensor for site, kept in reading.kept.items()}
            self.written |= written
            torch.set_rng_state(random)


def whole(site: Site) -> Site:
    """Site of the whole module, all channels."""
    return dataclasses.replace(site, branch=None) if site.branch else site


def _path(root: nn.Module, site: Site) -> Iterator[tuple[str, nn.Module]]:
    """Modules on the way from a network to a site, with their names inside one another."""
    module = root
    for name in filter(None, site.module.split(".")):
        module = module.get_submodule(name)
        yield name, module


_CHANGED = (
    "The network wrote into this batch of inputs, unlike into the first one of its form; it is "
    "changed. Let the network work on a copy of its inputs."
)


def _is_counted(tensor: Tensor) -> bool:
    """Whether a tensor counts how often it is written."""
    strided = not tensor.is_inference() and tensor.layout == torch.strided
    return strided and not is_functorch_wrapped_tensor(tensor)


def _form(tensors: list[Tensor]) -> tuple[Any, ...] | None:
    """Properties of inputs by which networks decide whether to work on copies of them.

    `None` if writing into them would not be noticed.
    """
    if not all(map(_is_counted, tensors)):
        return None
    return tuple((t.dtype, t.device, t.ndim, t.is_contiguous()) for t in tensors)


class _Kept:
    """Tensor of a site, and what it was like when the site was reached.

    Args:
        tensor: The tensor.
        copy: Whether the network is known to write into it.
        sample: Whether to keep some of its numbers, as writing through `.data` is not counted.
    """

    def __init__(self, tensor: Tensor, *, copy: bool, sample: bool) -> None:
        self.safe = copy or not _is_counted(tensor)
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
    """Pass of a network, to its end if it is the first one of its kind.

    Args:
        reader: Reader of the sites.
        is_first: Whether to count calls, and to look closely at what is written.
    """

    def __init__(self, reader: Reader, *, is_first: bool) -> None:
        self.reader, self.is_first = reader, is_first
        self.n_sites = len(reader.sites)
        self.kept: dict[Site, _Kept] = {}
        self.n_calls = dict.fromkeys(reader.sites, 0)

    def run(self, root: nn.Module, inputs: Any) -> bool:
        """Run the network, and return whether it came to its end."""
        hooks: list[RemovableHandle] = []
        try:
            for i, site in enumerate(self.reader.sites):
                keep = functools.partial(self._keep, site)
                hooks += [hook_module(self.reader.module(root, i), site, keep)]
            call_network(root, dict(inputs) if isinstance(inputs, Mapping) else inputs)
        except _Reached:
            return False
        except UserError:
            raise
        except Exception:
            if len(self.kept) < self.n_sites:
                raise
            return False  # behind the last site, where no other pass gets
        finally:
            for hook in hooks:
                hook.remove()
        missing = [site for site in self.reader.sites if site not in self.kept]
        if missing:
            raise SiteError(never_called(missing, self.n_calls))
        return True

    def _keep(self, site: Site, value: Any) -> Any:
        self.n_calls[site] += 1
        number = self.n_calls[site]
        if number == (site.call or 1):
            copy = site in self.reader.written
            self.kept[site] = _Kept(tensor_of(value, site), copy=copy, sample=self.is_first)
        elif site.call is None:
            raise SiteError(several_calls(site))
        if not self.is_first and len(self.kept) == self.n_sites:
            raise _Reached
        return value

    def within(self, given: list[_Kept]) -> set[Site]:
        """Sites whose tensors are in the memory of the inputs, which are the user's own."""
        memory = {kept.tensor.untyped_storage().data_ptr() for kept in given}
        return {
            site
            for site, kept in self.kept.items()
            if not kept.safe and kept.tensor.untyped_storage().data_ptr() in memory
        }


def several_calls(site: Site) -> str:
    """Sentence that refuses a site without a call, of a module that is called several times."""
    first, second = (dataclasses.replace(site, call=n) for n in (1, 2))
    return (
        f"Module {site.module!r} is called several times in one pass; name a call: {first}, "
        f"{second}, ..."
    )


def never_called(sites: Sequence[Site], n_calls: Mapping[Site, int]) -> str:
    """Sentence that refuses sites whose call never came in a pass."""
    called = {site: n for site in sites if (n := n_calls.get(site, 0))}
    if called:
        site, n = next(iter(called.items()))
        return f"The network calls {site.module!r} {n} time(s) in one pass; there is no {site}."
    names = ", ".join(map(str, sites))
    return f"The network ran without calling the module of: {names}."


def hook_module(
    module: nn.Module, site: Site, change: Callable[[Any], Any], *, aside: bool = False
) -> RemovableHandle:
    """Pass everything that the module of a site returns, or is given, through a function.

    Args:
        module: Module of the site.
        site: Site; its call, axes and branch are left out of account.
        change: Function from what is passed on to what is passed on instead.
        aside: Whether for passes that the user did not ask for, or for all others.

    Raises:
        SiteError: The module is scripted, and calls no hooks.
    """
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
