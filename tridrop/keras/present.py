"""Check that Keras is installed and uses its torch backend."""

from __future__ import annotations


def check_backend() -> None:
    """Raise ImportError if Keras is not installed, or does not use its torch backend.

    Keras takes its backend from KERAS_BACKEND, or from keras.json, when it is imported; without
    either it imports tensorflow.
    """
    set_it = 'set os.environ["KERAS_BACKEND"] = "torch" before keras is imported for the first time'
    try:
        import keras
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "keras":
            raise ImportError("tridrop.keras needs Keras 3: pip install keras") from error
        raise ImportError(
            f"tridrop.keras needs Keras on its torch backend, and keras itself could not be "
            f"imported for want of {missing}: {set_it}"
        ) from error
    if not hasattr(keras, "config") or keras.config.backend() != "torch":
        found = keras.config.backend() if hasattr(keras, "config") else f"keras {keras.__version__}"
        raise ImportError(
            f"tridrop.keras needs Keras 3 on its torch backend, and this is {found}: {set_it}"
        )
