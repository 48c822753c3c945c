"""The configuration of the site, which `sphinx-build -W --keep-going -n docs build/site` builds."""

import os
import re

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # signatures are the same on every machine

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import optax_ext
import pallas_kernels

project = html_title = "optax_ext"
author = "the authors of optax_ext"
html_theme = "sphinx_book_theme"
html_theme_options = {"show_toc_level": 2, "use_download_button": False}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = html_show_sphinx = html_copy_source = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

highlight_language = "none"  # the blocks of docstrings are formulas

# Backticks in a docstring are a link if the name has an entry, and code otherwise.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", ".*"), ("py:class", r"(?!optax_ext|pallas_kernels).*")]
autodoc_typehints = "none"
autodoc_preserve_defaults = True
maximum_signature_line_length = 72
napoleon_use_ivar = True

# What is public but not in `__all__` of a package.
MORE_PUBLIC = [
    *(f"optax_ext.formats.{name}" for name in ("BFloat16", "FourthRoot", "SignedRoot", "Split")),
    "optax_ext.testing.check_transformation",
    "pallas_kernels.flax.FusedOptimizer",
    "pallas_kernels.flax.FusedTrainState",
]


def check_public_names(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn about each public name without an entry; `-W` makes it an error."""
    del app
    public = [f"optax_ext.{name}" for name in optax_ext.__all__]
    public += [f"pallas_kernels.{name}" for name in pallas_kernels.__all__]
    found = env.domains.python_domain.objects
    for name in (*public, *MORE_PUBLIC):
        if name not in found:
            logging.getLogger(__name__).warning("the site has no entry for %s", name)


def link_pages_outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Make links to Markdown files outside of `docs/` downloads, because they are no pages here."""
    del app, page
    source[0] = re.sub(r"\]\((?=\.\./[\w/-]+\.md\))", "](path:", source[0])


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("source-read", link_pages_outside)
    app.connect("env-check-consistency", check_public_names)
