"""Which of ComfyUI's loaders ours can stand for, told to ComfyUI where it asks for that (0.33).

It replaces nodes of types that are not there, in prompts and, if a person wants that, in the page.
ComfyUI's own loaders are there, unless it was started without them: what a person does to have
them replaced is the action in `web/swap.js`.
"""

from comfy_api.latest import ComfyAPI, io

# Our loader → the one it stands for, whose inputs ours has under the same names, and its outputs.
_STANDS_FOR = {
    "TPLoadDiffusionModel": ("UNETLoader", ("unet_name", "weight_dtype"), 1),
    "TPLoadCheckpoint": ("CheckpointLoaderSimple", ("ckpt_name",), 3),
}


async def register_replacements() -> None:
    """Does nothing where this ComfyUI knows no replacements."""
    if not hasattr(io, "NodeReplace"):
        return
    for ours, (stock, inputs, num_outputs) in _STANDS_FOR.items():
        await ComfyAPI().node_replacement.register(
            io.NodeReplace(
                new_node_id=ours,
                old_node_id=stock,
                old_widget_ids=list(inputs),
                input_mapping=[{"new_id": name, "old_id": name} for name in inputs],
                output_mapping=[{"new_idx": i, "old_idx": i} for i in range(num_outputs)],
            )
        )
