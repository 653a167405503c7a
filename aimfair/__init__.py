__version__ = "0.1.0"


def _show_arguments():
    "In a notebook or IPython, help shows the arguments of this package with their comments."
    import sys
    ipython = sys.modules.get("IPython")
    if ipython and (shell := getattr(ipython, "get_ipython", lambda: None)()):
        from .help import show_arguments
        show_arguments(shell)


_show_arguments()
