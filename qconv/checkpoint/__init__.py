"""Safetensors checkpoints in and out, and the small files beside them as they are written.

``header``, ``reader``, ``maps`` and ``stream`` read shards with suspicion, tensor by tensor, mapped or straight from
the disk; ``writer`` publishes a shard only when what is on disk is what was meant; ``direct`` goes past the page cache;
``hub`` finds or fetches the folder, or gives ``hub_folder``, whose shards ``repository`` fetches into a ``window`` of
bounded size (``samples`` stand for them before); ``quantized`` reads quantized weights as the dense ones that they
stand for, which ``fp8`` and ``mxfp4`` know. ``config``, ``rope`` and ``generation_config`` are typed access to what
config.json and its like say, ``tokenizer`` loads what transformers can. No architecture, grid or format of a build is
known here.
"""
