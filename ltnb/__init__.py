"Long-tailed image classification with diffusion models; what is named here is imported when it is first asked for"
__version__ = "0.0.1"

_ROOMS = {"LongTail": "sources", "Classifier": "classifier", "Synthetic": "synthetic", "fit": "training"}


def __getattr__(name): # PEP 562: `import ltnb` stays free of torch and numpy
    if name not in _ROOMS: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    globals()[name] = value = getattr(import_module(f"ltnb.{_ROOMS[name]}"), name)
    return value


def __dir__():
    return sorted({*globals(), *_ROOMS})


def load(run # a run directory, or its folder `model`
        ): # its Classifier
    "The classifier of a run; see `ltnb.classifier.load_classifier`"
    from ltnb.classifier import load_classifier
    return load_classifier(run)


def run(name:str, # of the recipe: "baseline", "ldmlr", "diffult", "chatdiff", "discl", "diffusion" or "combine"
        /,
        **settings # of its config; a name that it does not have is a `UsageError`
       ): # the finished Run
    "Run a recipe, as `ltnb run NAME --plain` does: the same call finds its run again, and goes on where it stopped"
    from ltnb.cli import find_recipe
    recipe = find_recipe(name).load()
    config = recipe.config.from_dict(settings)
    return recipe.of(config).run(config)
