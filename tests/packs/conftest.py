"""The tiny base and the packs beside it that these tests share with those of `model.experts`."""

from pack_fixtures import base, ids, make_module, make_pack, model, own_home

__all__ = ["base", "ids", "make_module", "make_pack", "model", "own_home"]
