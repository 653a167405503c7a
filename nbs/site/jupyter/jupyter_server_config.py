"What `make lab` adds to a reader's own settings: notebooks are saved as they are kept, so that version control sees nothing but edits."
from nbdev.clean import clean_jupyter

c.ContentsManager.pre_save_hook = clean_jupyter  # noqa: F821
