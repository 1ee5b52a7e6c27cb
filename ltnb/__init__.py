__version__ = "0.0.1"


def load(run # a run directory, or its folder `model`
        ):
    "The classifier of a run; see `ltnb.classifier.load_classifier`"
    from ltnb.classifier import load_classifier
    return load_classifier(run)
