"""How Sphinx builds the site; build.py lays out what it reads."""

import os
import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
os.environ.setdefault("TERM", "dumb")  # no colours in what commands say of themselves
from build import read_elsewhere  # noqa: E402

settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(HERE.parents[1] / "settings.ini", encoding="utf-8")

project = "aimfair"
author = copyright = "aimfair authors"
version = release = settings["DEFAULT"]["version"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx_copybutton", "extension"]
root_doc = "index"
exclude_patterns = ["LICENSE"]

nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_merge_streams = True
nb_ipywidgets_js = {}  # from a network
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
add_module_names = False

# written by build.py beside the source
intersphinx_mapping = {name: (url, f"../inventories/{name}.inv") for name, (url, _) in read_elsewhere().items()}

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_context = {"default_mode": "auto"}
html_title = "aimfair"
html_static_path = [str(HERE / "_static")]
html_css_files = ["aimfair.css"]
html_copy_source = False
html_show_search_summary = False  # it would be fetched, which pages that are opened as files may not
html_show_sourcelink = False
html_show_sphinx = False
html_sidebars = {"index": []}
html_theme_options = {
    "logo": {"text": "aimfair"},
    "navbar_center": ["navbar-nav"],
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "navigation_depth": 3,
    "show_nav_level": 1,
    "show_toc_level": 1,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "back_to_top_button": False,
    "use_edit_page_button": False,
}
copybutton_exclude = ".linenos, .gp, .go"
