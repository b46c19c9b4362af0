"""A server whose experts stay in their files: upload, use, refusal, figures."""

from pathlib import Path

from live_server import live

from deepseek.packs.pack import read_pack


def test_experts_are_plugged_used_and_refused_within_a_budget(tmp_path: Path) -> None:
    with live(tmp_path) as server, server.http() as http:
        experts = server.engine.model.experts
        manifest = read_pack(server.folder / "one.safetensors").manifest
        size = 4 * 3 * len(manifest.layers) * manifest.width * manifest.base.hidden_size
        experts.weight_cache.limit = size
        assert http.post("/v1/experts", json={"name": "one"}).status_code == 201
        content = (server.folder / "two.safetensors").read_bytes()
        assert http.post("/v1/experts/upload", content=content).status_code == 201
        ask = {"prompt": "a", "max_tokens": 4, "temperature": 0}
        for name in ("one", "two", "one"):
            reply = http.post("/v1/completions", json={**ask, "model": f"tiny+{name}"})
            assert list(reply.json()["experts"]) == [name]
        refused = http.post("/v1/completions", json={**ask, "model": "tiny+one+two"})
        assert refused.status_code == 400
        error = refused.json()["error"]["message"]
        assert "of one, two need" in error or "of two, one need" in error
        metrics = http.get("/metrics").text
        assert f"deepseek_expert_bytes {float(size)}" in metrics
        assert "deepseek_expert_loads_total 3.0" in metrics
        modules = experts.choose(["one"]).roster.modules
        assert [module.nbytes for module in modules] == [size]
