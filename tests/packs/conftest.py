"""The tiny base and its packs, shared with the tests of `model.experts`."""

from pack_fixtures import base, ids, make_module, make_pack, model, own_home

__all__ = ["base", "ids", "make_module", "make_pack", "model", "own_home"]
