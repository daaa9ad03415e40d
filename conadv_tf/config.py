"""Strict gin: every name, parameter, type and macro in the recipes must mean something; see docs/recipes.md.

A recipe holds values and nothing else. What gin can do beyond that, import modules, call functions, bind in scopes, is
refused, so that a recipe from a stranger runs no code of its own.
"""

import difflib
import functools
import importlib
import inspect
import math
import os
import pprint
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import gin
from gin import config as gin_config
from gin import config_parser

from conadv_tf.errors import ConfigError

# The modules whose configurables recipes set. gin knows a configurable once its module has been imported.
CONFIGURED_MODULES = (
    "data.augment",
    "data.datasets",
    "data.sources",
    "data.streaming",
    "data.subset",
    "methods.attack",
    "methods.controls",
    "methods.method",
    "methods.mixture",
    "run.build",
    "run.divergence",
    "run.model_settings",
    "run.monitor",
    "run.strategy",
    "training.lars",
    "training.learning_rate",
    "training.losses",
    "training.optimizers",
)
# Width at which gin writes every binding on one line.
ONE_LINE = 100_000

DEFAULT_RECIPE = "digits_conadv.gin"

# Settings of earlier versions, and where they are now; {source} is what data.source says.
MOVED = {
    "data.augmentation": "{source}.augmentation",
    "data.autoaugment": "autoaugment.policy",
    "data.autoaugment_mode": "autoaugment.mode",
    "data.cache": "stream.cache",
    "data.image_size": "{source}.image_size",
    "data.in_memory": "{source}.in_memory",
    "data.label_offset": "{source}.label_offset",
    "data.name": "{source}.name",
    "data.num_classes": "{source}.num_classes",
    "data.num_train": "{source}.num_train",
    "data.service": "stream.service",
    "data.shuffle_buffer": "stream.shuffle_buffer",
    "data.test_files": "{source}.test_files",
    "data.test_split": "{source}.test_split",
    "data.tfds_name": "tfds.dataset",
    "data.train_files": "{source}.train_files",
    "data.train_split": "{source}.train_split",
}


def recipe_folder() -> str:
    """The folder of the recipes: gin/ beside the package in a checkout, inside it when installed."""
    package = os.path.dirname(os.path.abspath(__file__))
    inside, beside = os.path.join(package, "gin"), os.path.join(os.path.dirname(package), "gin")
    return inside if os.path.isdir(inside) else beside


def register() -> None:
    """Makes every configurable known to gin."""
    for module in CONFIGURED_MODULES:
        importlib.import_module(f"conadv_tf.{module}")


def configure(gin_files: Sequence[str], gin_params: Sequence[str]) -> None:
    """Parses recipes and bindings, later ones over earlier ones, and locks the configuration.

    Args:
      gin_files: paths, as given or below gin/.
      gin_params: bindings such as "attack.epsilon_pixels=4".

    Raises:
      ConfigError: for a missing file, an unknown name, a misspelt parameter, a value of the wrong type, an unused
        macro, or a statement that is no value.
    """
    bindings(gin_files, gin_params)
    register()
    gin.clear_config()
    # Files only: gin would also look for Python packages, and take a folder `data` here for one.
    gin_config._FILE_READERS[:] = [(_open_recipe, os.path.isfile)]
    gin_config._LOCATION_PREFIXES[:] = ["", recipe_folder()]
    for path in gin_files:
        _parse(functools.partial(gin.parse_config_file, path, skip_unknown=False), path)
    for binding in gin_params:
        _parse(functools.partial(gin.parse_config, binding, skip_unknown=False), f"--gin_param={binding!r}")
    _check_macros()
    _parse(gin.finalize, "the configuration")
    for name, function, parameter, value in _bindings():
        _check_type(f"{name}.{parameter}", function, parameter, value)


def bindings(gin_files: Sequence[str], gin_params: Sequence[str] = ()) -> dict[str, Any]:
    """The values that recipes and bindings give to settings and macros, later ones over earlier ones, by name.

    Takes no TensorFlow, and so cannot tell whether a setting exists, as `configure` does. A value may be a macro.

    Raises:
      ConfigError: for a missing file, or a statement that is no value; see `configure`.
    """
    found: dict[str, Any] = {}
    for path in gin_files:
        found |= _bindings_of_file(path, ())
    for binding in gin_params:
        found |= _bindings_of_text(binding, f"--gin_param={binding!r}", ())
    return found


def as_written(value: Any) -> str:
    """The value as gin writes it in a configuration with one binding a line."""
    return pprint.pformat(value, width=ONE_LINE)


def recipe_name(gin_files: Sequence[str]) -> str:
    """The name of a run: "96k_conadv" for ["gin/96k_conadv.gin"]; several are joined by "+"."""
    return "+".join(os.path.splitext(os.path.basename(path))[0] for path in gin_files)


def setting(name: str):
    """The value that a recipe or flag gives to a setting such as "data.source"; None where none does."""
    try:
        return _resolved(gin.query_parameter(name))
    except ValueError:
        return None


def operative_config() -> str:
    """Lists every setting that had an effect so far, defaults included, as gin text with one binding a line."""
    lines = gin.operative_config_str(max_line_length=ONE_LINE).splitlines()
    return "\n".join(line for line in lines if not line.startswith("#")).strip() + "\n"


def configure_without_files(gin_files: Sequence[str], gin_params: Sequence[str]) -> None:
    """Configures a run on synthetic images in the place of files, to look at it without its data.

    The synthetic images have the name, size, classes and number of the files' images.

    Raises:
      ConfigError: see `configure`; also for files whose images are not counted by the recipe.
    """
    configure(gin_files, gin_params)
    source = setting("data.source")
    if source not in sources() or not sources()[source].reads_files:
        return
    if setting(f"{source}.num_train") is None:
        raise ConfigError(f"--preflight without --data_dir cannot count the images: set {source}.num_train")
    shared = [name for name in parameters("synthetic") if name in parameters(source) and name != "augmentation"]
    values = {name: setting(f"{source}.{name}") for name in shared}
    stand_in = [f"synthetic.{name} = {value!r}" for name, value in values.items() if value is not None]
    configure(gin_files, [*gin_params, "data.source = 'synthetic'", "synthetic.augmentation = 'none'", *stand_in])
    # Reads the settings of the files too, so that they count as used.
    if gin.get_configurable(source)().streams:
        gin.get_configurable("stream")()


def parse_settings(text: str) -> dict[str, str]:
    """The bindings of gin text with one binding a line, name to value, both as written."""
    lines = (line.split(" = ", 1) for line in text.splitlines() if " = " in line and not line.startswith("#"))
    return {name: value for name, value in lines}


def bindings_without_effect() -> list[str]:
    """Lists the settings bound by recipes or flags that nothing in this run has read."""
    read = parse_settings(operative_config())
    names = [f"{name}.{parameter}" for name, _, parameter, _ in _bindings()]
    return [name for name in names if name not in read]


def bound_name(binding: str) -> str:
    """The setting that a gin parameter binds, without its module: "attack.epsilon_pixels"."""
    return ".".join(binding.partition("=")[0].strip().split(".")[-2:])


def sources() -> dict[str, Any]:
    """The classes of the sources of data, by what data.source may say."""
    return importlib.import_module("conadv_tf.data.sources").SOURCES


def _resolved(value: Any) -> Any:
    """The value itself, or what the macro stands for."""
    is_macro = isinstance(value, gin_config.ConfigurableReference)
    return gin.query_parameter(f"{value.scoped_selector}.value") if is_macro else value


def _open_recipe(path: str) -> TextIO:
    """A recipe, opened to be read; it may begin with the mark that Windows' editors put before UTF-8."""
    return open(path, encoding="utf-8-sig")


def _bindings_of_file(path: str, including: tuple[str, ...]) -> dict[str, Any]:
    """The bindings of a file, found as given or below gin/, and of what it includes; see `_bindings_of_text`."""
    found = next((p for p in (path, os.path.join(recipe_folder(), path)) if os.path.isfile(p)), None)
    if not found:
        raise ConfigError(f"{path} is not found here nor under gin/: {_suggestion(path, _recipes())}")
    if found in including:
        raise ConfigError(f"{path} includes itself, through {including[-1]}: drop one of the includes")
    try:
        with _open_recipe(found) as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({str(error).splitlines()[0]}): name a recipe") from error
    return _bindings_of_text(text, path, (*including, found))


def _bindings_of_text(text: str, source: str, including: tuple[str, ...]) -> dict[str, Any]:
    """The values of a recipe's text by name.

    Raises:
      ConfigError: unless every statement includes a recipe, or binds a value to a name that has not moved.
    """
    found: dict[str, Any] = {}
    delegate = gin_config.ParserDelegate(skip_unknown=False)
    statements = _parse(lambda: list(config_parser.ConfigParser(text, delegate)), source)
    for statement in statements:
        if isinstance(statement, config_parser.IncludeStatement):
            found |= _bindings_of_file(statement.filename, including)
        elif isinstance(statement, config_parser.ImportStatement):
            raise ConfigError(f"{source}: import {statement.module}: recipes hold values and import nothing: drop it")
        elif statement.scope:
            scoped = f"{statement.scope}/{statement.selector}"
            raise ConfigError(f"{source}: {scoped}: scopes mean nothing here: write {statement.selector}")
        elif statement.selector.startswith("gin."):
            raise ConfigError(f"{source}: {statement.selector} is gin's own, not a setting: drop it")
        elif isinstance(statement, config_parser.BindingStatement):
            name = f"{statement.selector}.{statement.arg_name}" if statement.arg_name else statement.selector
            if bound_name(name) in MOVED:
                raise ConfigError(f"{source}: {_moved(bound_name(name))}")
            _check_value(name, statement.value, source)
            found[bound_name(name)] = statement.value
    return found


def _check_value(name: str, value, source: str) -> None:
    """Raises ConfigError for a call of a function, and for a number that is not finite."""
    for part in _parts(value):
        if isinstance(part, gin_config.ConfigurableReference) and part.selector != "gin.macro":
            raise ConfigError(f"{source}: {name} = {part}: recipes hold values and call nothing: write the value")
        if isinstance(part, complex) or (isinstance(part, float) and not math.isfinite(part)):
            raise ConfigError(f"{source}: {name} = {part} is not a finite number: write one")


def _parts(value) -> Iterator:
    """The parts of a list, tuple, set or dictionary, or the value itself."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set)):
        for part in value:
            yield from _parts(part)
    else:
        yield value


def _parse(parse: Callable[[], Any], source: str) -> Any:
    try:
        return parse()
    except Exception as error:  # gin raises ValueError, TypeError, SyntaxError, RuntimeError and its own
        raise ConfigError(f"{source}: {_explanation(error)}") from error


def _explanation(error: Exception) -> str:
    """Puts gin's message on one line, with the nearest right name where a wrong one is the cause."""
    text = str(error)
    cause = text.strip().splitlines()[0].rstrip(".") if text.strip() else type(error).__name__
    place = re.search(r"In (?:file|bindings string) (.*)$", text, re.MULTILINE)
    where = f" ({place.group(0).strip()})" if place and "bindings" not in place.group(0) else ""
    unknown = re.search(r"No configurable matching '([^']+)'", text)
    misspelt = re.search(r"[Cc]onfigurable '([^']+)' doesn't have a parameter named '([^']+)'", text)
    if unknown:
        return f"{cause}{where}: {_suggestion(unknown.group(1), configurables())}"
    if misspelt:
        return f"{cause}{where}: {_suggestion(misspelt.group(2), [*parameters(misspelt.group(1))])}"
    if undefined := re.search(r"No bindings specified for '([^']+)/gin.macro'", text):
        name = undefined.group(1)
        return f"the macro %{name} is not defined: write {name} = value, or the value itself"
    if isinstance(error, SyntaxError) or "malformed node" in cause:
        cause = "a value is no number, text in quotes, list, True or None" if "malformed node" in cause else cause
        return f"{cause}{where}: write name.parameter = value, with quotes around text"
    return cause + where


def _moved(name: str) -> str:
    """Says where a setting of an earlier version is now."""
    configurable, parameter = MOVED[name].split(".")
    if configurable != "{source}":
        return f"{name} is now {MOVED[name]}: write that"
    having = [source for source in sources() if parameter in parameters(source)]
    lacking = [source for source in sources() if source not in having]
    *others, last = (f"{source}.{parameter}" for source in having)
    choice = f"{', '.join(others)} or {last}, as data.source says"
    places = choice if others else f"{last}, with data.source={having[0]!r}"
    return f"{name} is now {places}{'; none for ' * bool(lacking)}{', '.join(lacking)}: write that"


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(sorted(known))}"


def _recipes() -> list[str]:
    folder = recipe_folder()
    paths = [os.path.join(parent, file) for parent, _, files in os.walk(folder) for file in files]
    return [os.path.relpath(path, folder) for path in paths if path.endswith(".gin")]


def configurables() -> list[str]:
    """The names of our own configurables, the parts of a recipe."""
    return [c.name for _, c in gin_config._REGISTRY.items() if c.wrapped.__module__.startswith("conadv_tf")]


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """The parameters of a configurable that recipes may set, by name."""
    configurable = gin_config._REGISTRY.get_match(name)
    found = inspect.signature(configurable.wrapped).parameters
    return {name: parameter for name, parameter in found.items() if name not in (configurable.denylist or ())}


def _bindings() -> Iterator[tuple[str, typing.Callable, str, typing.Any]]:
    """Lists (name, function or class, parameter, value) of each binding but macros; gin has no public list of them."""
    for (_, selector), parameters in gin_config._CONFIG.items():
        configurable = gin_config._REGISTRY[selector]
        if selector not in ("gin.macro", "gin.constant"):
            for parameter, value in parameters.items():
                yield configurable.name, configurable.wrapped, parameter, value


def _check_macros() -> None:
    text = gin.config_str(max_line_length=ONE_LINE)
    defined = re.findall(r"^([A-Za-z_]\w*) = ", text, re.MULTILINE)
    for name in defined:
        if not re.search(rf"%{name}\b", text):
            raise ConfigError(
                f"the macro {name} is defined but nothing uses it: write %{name} where it is meant, or drop it"
            )


def _check_type(name: str, function: typing.Callable, parameter: str, value) -> None:
    expected = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function).get(parameter)
    choices = typing.get_args(expected) or (expected,)
    kinds = tuple(typing.get_origin(kind) or kind for kind in choices)
    value = _resolved(value)
    if expected is None or not all(map(inspect.isclass, kinds)):
        return
    accepted = kinds + ((int,) if float in kinds else ())
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        default = inspect.signature(function).parameters[parameter].default
        remedy = f"; the default is {default!r}" if isinstance(default, accepted) else ""
        raise ConfigError(f"{name}={value!r} must be {wanted}{remedy}")
