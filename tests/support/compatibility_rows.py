"""The workflows of the compatibility table, and the nodes that need none."""

from dataclasses import replace

from support.compatibility import (
    SMALL,
    Edit,
    FailsInStock,
    Family,
    NoEffect,
    Refused,
    Row,
    Same,
    all_of,
    beside,
    each_value,
    from_picture,
    given,
    insert,
    on_latent,
    on_model,
    on_positive,
    share,
    with_pictures,
)
from support.workflows import Prompt, node

CFG = replace(SMALL, cfg=2.5)
HALF = replace(SMALL, steps=4, denoise=0.5)


def _words(text: str) -> list[str]:
    return text.split()


NEWER_SAMPLERS = ["exp_heun_2_x0", "exp_heun_2_x0_sde"]

# ComfyUI's samplers and schedulers, from KSampler's lists.
SAMPLERS = _words(
    """
    euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp heun heunpp2 dpm_2 dpm_2_ancestral lms
    dpm_adaptive dpm_fast dpmpp_2s_ancestral dpmpp_2s_ancestral_cfg_pp dpmpp_sde dpmpp_sde_gpu
    dpmpp_2m dpmpp_2m_cfg_pp dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu
    dpmpp_3m_sde dpmpp_3m_sde_gpu ddpm lcm ipndm ipndm_v deis res_multistep res_multistep_cfg_pp
    res_multistep_ancestral res_multistep_ancestral_cfg_pp gradient_estimation
    gradient_estimation_cfg_pp er_sde seeds_2 seeds_3 sa_solver sa_solver_pece ddim uni_pc
    uni_pc_bh2
    """
)
SCHEDULERS = _words(
    """
    simple sgm_uniform karras exponential ddim_uniform beta normal linear_quadratic kl_optimal
    """
)
SAMPLER_NODES = _words(
    """
    SamplerDPMPP_2M_SDE SamplerDPMPP_2S_Ancestral SamplerDPMPP_3M_SDE
    SamplerDPMAdaptative SamplerDPMPP_SDE SamplerER_SDE SamplerEulerAncestral
    SamplerEulerAncestralCFGPP SamplerEulerCFGpp SamplerLCMUpscale SamplerLMS SamplerSASolver
    """
)
# Scheduler node → what it needs to make sigmas of a flow model.
SCHEDULER_NODES: dict[str, dict[str, object]] = {
    "BasicScheduler": {"model": ["model", 0], "scheduler": "normal"},
    "BetaSamplingScheduler": {"model": ["model", 0]},
    "SDTurboScheduler": {"model": ["model", 0]},
    "KarrasScheduler": {"sigma_max": 1.0, "sigma_min": 0.03},
    "ExponentialScheduler": {"sigma_max": 1.0, "sigma_min": 0.03},
    "PolyexponentialScheduler": {"sigma_max": 1.0, "sigma_min": 0.03},
    "LaplaceScheduler": {"sigma_max": 1.0, "sigma_min": 0.03},
    "VPScheduler": {},
    "AlignYourStepsScheduler": {"model_type": "SD1"},
    "GITSScheduler": {},
    "OptimalStepsScheduler": {"model_type": "FLUX"},
    "LTXVScheduler": {},
    "Flux2Scheduler": {"width": 64, "height": 64},
}


# The same, in newer releases only.
NEWER_SCHEDULER_NODES: dict[str, dict[str, object]] = {
    "Ideogram4Scheduler": {"steps": 3, "width": 256, "height": 256},
    "ManualSigmas": {"sigmas": "1.0, 0.7, 0.3, 0.0"},
}


def _custom(prompt: Prompt, name: str, **links: object) -> None:
    """Another SamplerCustomAdvanced with its SaveLatent, like the one there but for `links`."""
    prompt[name] = node("SamplerCustomAdvanced", **prompt["sampler"]["inputs"] | links)
    prompt[f"save {name}"] = node(
        "SaveLatent", samples=[name, 0], filename_prefix=f"latents/{name}"
    )


def _each_sampler_node(prompt: Prompt, family: Family) -> None:
    for name in share(SAMPLER_NODES, family):
        model = {"model": ["model", 0]} if name == "SamplerSASolver" else {}
        prompt[f"method {name}"] = node(name, **model)
        _custom(prompt, name, sampler=[f"method {name}", 0])


def _each_scheduler_node(prompt: Prompt, family: Family) -> None:
    for name in share(SCHEDULER_NODES, family):
        inputs = SCHEDULER_NODES[name]
        steps = {"steps": 10 if name in ("AlignYourStepsScheduler", "GITSScheduler") else 3}
        prompt[f"sigmas {name}"] = node(name, **steps | inputs)
        _custom(prompt, name, sigmas=[f"sigmas {name}", 0])


def _each_newer_node(prompt: Prompt, _: Family) -> None:
    for name in ("SamplerLCM", "SamplerSEEDS2"):
        prompt[f"method {name}"] = node(name)
        _custom(prompt, name, sampler=[f"method {name}", 0])
    for name, inputs in NEWER_SCHEDULER_NODES.items():
        prompt[f"sigmas {name}"] = node(name, **inputs)
        _custom(prompt, name, sigmas=[f"sigmas {name}", 0])


def _dual_model(prompt: Prompt, family: Family) -> None:
    """The negative conditioning goes to the stock loader's model of the same file."""
    prompt["other"] = node("UNETLoader", unet_name=family.file, weight_dtype="default")
    prompt["guider"] = node(
        "DualModelGuider",
        model=["model", 0],
        model_negative=["other", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        cfg=2.0,
    )


def _each_way_to_change_sigmas(prompt: Prompt, _: Family) -> None:
    sigmas = {"sigmas": ["schedule", 0]}
    prompt |= {
        "start": node("SamplingPercentToSigma", model=["model", 0], sampling_percent=0.2),
        "SetFirstSigma": node("SetFirstSigma", sigma=["start", 0], **sigmas),
        "SplitSigmas": node("SplitSigmas", step=2, **sigmas),
        "SplitSigmasDenoise": node("SplitSigmasDenoise", denoise=0.6, **sigmas),
        "ExtendIntermediateSigmas": node("ExtendIntermediateSigmas", start_at_sigma=1.0, **sigmas),
    }
    for name in ("SetFirstSigma", "SplitSigmas", "SplitSigmasDenoise", "ExtendIntermediateSigmas"):
        _custom(prompt, f"with {name}", sigmas=[name, 0])


def _add_noise(prompt: Prompt, _: Family) -> None:
    prompt["noisy"] = node(
        "AddNoise",
        model=["model", 0],
        noise=["noise", 0],
        sigmas=["schedule", 0],
        latent_image=["latent", 0],
    )
    prompt["no noise"] = node("DisableNoise")
    prompt["sampler"]["inputs"] |= {"noise": ["no noise", 0], "latent_image": ["noisy", 0]}


def _two_stages(prompt: Prompt, _: Family) -> None:
    links = {
        "model": ["model", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "noise_seed": 7,
        "steps": 4,
        "cfg": 1.0,
    }
    prompt["first"] = node(
        "KSamplerAdvanced",
        latent_image=["latent", 0],
        add_noise="enable",
        end_at_step=2,
        return_with_leftover_noise="enable",
        **links,
    )
    prompt["sampler"] = node(
        "KSamplerAdvanced",
        latent_image=["first", 0],
        add_noise="disable",
        start_at_step=2,
        **links,
    )


def _sampler_custom(prompt: Prompt, _: Family) -> None:
    prompt["method"] = node("KSamplerSelect", sampler_name="dpmpp_2m")
    prompt["schedule"] = node("BasicScheduler", model=["model", 0], steps=3)
    prompt["sampler"] = node(
        "SamplerCustom",
        model=["model", 0],
        cfg=2.5,
        noise_seed=7,
        positive=["positive", 0],
        negative=["negative", 0],
        sampler=["method", 0],
        sigmas=["schedule", 0],
        latent_image=["latent", 0],
    )


def _second_pass(prompt: Prompt, _: Family) -> None:
    """High-resolution fix: the result, larger, sampled again."""
    prompt["larger"] = node(
        "LatentUpscaleBy", samples=["sampler", 0], upscale_method="nearest-exact", scale_by=1.5
    )
    again = prompt["sampler"]["inputs"] | {"latent_image": ["larger", 0], "denoise": 0.6}
    prompt["second"] = node("KSampler", **again)
    prompt["save"]["inputs"]["samples"] = ["second", 0]


def _guider(class_type: str, **inputs: object) -> Edit:
    return beside(guider=node(class_type, model=["model", 0], **inputs))


def _more_captions(prompt: Prompt, _: Family) -> None:
    for number, name in ((3, "second"), (4, "third")):
        caption = prompt["positive"]["inputs"] | {"seed": number}
        prompt[name] = node("TPTestConditioning", **caption)


# Conditioning nodes that put two together: class → (the sockets, other inputs).
def _two_captions(class_type: str, first: str, second: str, **inputs: object) -> Edit:
    def edit(prompt: Prompt, family: Family) -> None:
        _more_captions(prompt, family)
        insert(prompt, "positive", class_type, first, **{second: ["second", 0]}, **inputs)

    return edit


def _area(class_type: str, **inputs: object) -> Edit:
    """The first caption rules one place, the second the whole picture."""
    return all_of(
        _two_captions("ConditioningCombine", "conditioning_1", "conditioning_2"),
        on_positive(class_type, **inputs),
    )


def _pair_nodes(prompt: Prompt, family: Family) -> None:
    """The newer conditioning nodes, which work on positive and negative at once."""
    with_pictures(prompt, family)
    _more_captions(prompt, family)
    prompt |= {
        "range": node("ConditioningTimestepsRange", start_percent=0.3, end_percent=1.0),
        "pair": node(
            "PairConditioningSetProperties",
            positive_NEW=["second", 0],
            negative_NEW=["third", 0],
            strength=0.7,
            mask=["mask", 0],
            timesteps=["range", 0],
        ),
        "both": node(
            "PairConditioningCombine",
            positive_A=["positive", 0],
            negative_A=["negative", 0],
            positive_B=["pair", 0],
            negative_B=["pair", 1],
        ),
        "default": node(
            "PairConditioningSetDefaultCombine",
            positive=["both", 0],
            negative=["both", 1],
            positive_DEFAULT=["third", 0],
            negative_DEFAULT=["second", 0],
        ),
    }
    prompt["sampler"]["inputs"] |= {"positive": ["default", 0], "negative": ["default", 1]}


def _references(count: int, method: str | None = None) -> Edit:
    def edit(prompt: Prompt, family: Family) -> None:
        prompt["reference"] = node("LoadLatent", latent=family.latent)
        for _ in range(count):
            insert(prompt, "positive", "ReferenceLatent", "conditioning", latent=["reference", 0])
        if method:
            insert(
                prompt,
                "positive",
                "FluxKontextMultiReferenceLatentMethod",
                "conditioning",
                reference_latents_method=method,
            )

    return edit


def _controlnet(class_type: str = "ControlNetApplyAdvanced", **inputs: object) -> Edit:
    def edit(prompt: Prompt, family: Family) -> None:
        with_pictures(prompt, family)
        prompt["net"] = node("ControlNetLoader", control_net_name=family.file)
        prompt["control"] = node(
            class_type,
            positive=["positive", 0],
            negative=["negative", 0],
            control_net=["net", 0],
            image=["picture", 0],
            vae=["vae", 0],
            **inputs,
        )
        prompt["sampler"]["inputs"] |= {"positive": ["control", 0], "negative": ["control", 1]}

    return edit


def _two_controlnets(prompt: Prompt, family: Family) -> None:
    _controlnet(strength=0.6, end_percent=0.5)(prompt, family)
    prompt["control 2"] = node(
        "ControlNetApplyAdvanced",
        **prompt["control"]["inputs"]
        | {"positive": ["control", 0], "negative": ["control", 1], "strength": 0.4}
        | {"end_percent": 1.0},
    )
    prompt["sampler"]["inputs"] |= {"positive": ["control 2", 0], "negative": ["control 2", 1]}


def _controlnet_apply(prompt: Prompt, family: Family) -> None:
    with_pictures(prompt, family)
    prompt["net"] = node("DiffControlNetLoader", model=["model", 0], control_net_name=family.file)
    insert(
        prompt,
        "positive",
        "ControlNetApply",
        "conditioning",
        control_net=["net", 0],
        image=["picture", 0],
        strength=0.8,
    )


def _masked(prompt: Prompt, family: Family) -> None:
    from_picture(prompt, family)
    with_pictures(prompt, family)
    insert(prompt, "latent", "SetLatentNoiseMask", "samples", mask=["mask", 0])


def _inpaint_conditioning(prompt: Prompt, family: Family) -> None:
    with_pictures(prompt, family)
    prompt["inpaint"] = node(
        "InpaintModelConditioning",
        positive=["positive", 0],
        negative=["negative", 0],
        vae=["vae", 0],
        pixels=["picture", 0],
        mask=["mask", 0],
    )
    prompt["sampler"]["inputs"] |= {
        "positive": ["inpaint", 0],
        "negative": ["inpaint", 1],
        "latent_image": ["inpaint", 2],
    }


def _picture_to_picture(prompt: Prompt, family: Family) -> None:
    """Encoded before and decoded after; decoded pictures are compared through the encoder."""
    with_pictures(prompt, family)
    prompt |= {
        "latent": node("VAEEncode", pixels=["picture", 0], vae=["vae", 0]),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "shown": node("SaveImage", images=["decoded", 0]),
        "again": node("VAEEncode", pixels=["decoded", 0], vae=["vae", 0]),
    }
    prompt["save"]["inputs"]["samples"] = ["again", 0]


def _composite(prompt: Prompt, family: Family) -> None:
    from_picture(prompt, family)
    with_pictures(prompt, family)
    prompt["empty"] = node(family.empty_latent, width=64, height=64)
    insert(
        prompt,
        "latent",
        "LatentCompositeMasked",
        "destination",
        source=["empty", 0],
        mask=["mask", 0],
    )


def _perp_neg(prompt: Prompt, family: Family) -> None:
    _more_captions(prompt, family)
    insert(prompt, "model", "PerpNeg", "model", empty_conditioning=["second", 0])


def _latent_operation(prompt: Prompt, _: Family) -> None:
    prompt["operation"] = node("LatentOperationTonemapReinhard")
    insert(prompt, "model", "LatentApplyOperationCFG", "model", operation=["operation", 0])


def _merged(class_type: str) -> Edit:
    """The second model of the merge is the stock loader's, of the same file."""

    def edit(prompt: Prompt, family: Family) -> None:
        prompt["other"] = node("UNETLoader", unet_name=family.file, weight_dtype="default")
        merge = insert(prompt, "model", class_type, "model1")
        prompt[merge]["inputs"]["model2"] = ["other", 0]

    return edit


def _saved(class_type: str, **inputs: object) -> Edit:
    return beside(saved=node(class_type, model=["model", 0], **inputs))


def _model_patch(output: int, class_type: str) -> Edit:
    def edit(prompt: Prompt, family: Family) -> None:
        with_pictures(prompt, family)
        prompt["patch"] = node("TPTestModelPatches")
        more = (
            {"vae": ["vae", 0], "image": ["picture", 0]}
            if class_type == "QwenImageDiffsynthControlnet"
            else {"clip_vision_output": ["patch", 2]}
        )
        insert(prompt, "model", class_type, "model", model_patch=["patch", output], **more)

    return edit


def _context_windows(prompt: Prompt, family: Family) -> None:
    """Windows over the rows of the picture."""
    rows = len(family.latent_shape) - 1
    insert(
        prompt,
        "model",
        "ContextWindowsManual",
        "model",
        context_length=4,
        context_overlap=2,
        dim=rows,
    )


def _wan_context_windows(prompt: Prompt, family: Family) -> None:
    """Windows over the frames, where a model makes more than one."""
    if family.name == "wan":
        size = {"width": 64, "height": 64, "length": 25}
        prompt["latent"] = node("EmptyHunyuanLatentVideo", batch_size=1, **size)
    insert(
        prompt,
        "model",
        "WanContextWindowsManual",
        "model",
        context_length=13,
        context_overlap=5,
    )


def _merged_into_stock(prompt: Prompt, family: Family) -> None:
    prompt["other"] = node("UNETLoader", unet_name=family.file, weight_dtype="default")
    prompt["merge"] = node("ModelMergeSimple", model1=["other", 0], model2=["model", 0], ratio=0.5)
    prompt["sampler"]["inputs"]["model"] = ["merge", 0]


def _lora_save(prompt: Prompt, family: Family) -> None:
    _merged_into_stock(prompt, family)
    prompt["merge"] = node("ModelMergeSubtract", model1=["model", 0], model2=["other", 0])
    prompt["sampler"]["inputs"]["model"] = ["model", 0]
    prompt["saved"] = node("LoraSave", model_diff=["merge", 0])


def _train(prompt: Prompt, family: Family) -> None:
    from_picture(prompt, family)
    prompt |= {
        "two": node("RepeatLatentBatch", samples=["latent", 0], amount=2),
        "list": node("RebatchLatents", latents=["two", 0], batch_size=1),
        "train": node(
            "TrainLoraNode",
            model=["model", 0],
            latents=["list", 0],
            positive=["positive", 0],
            steps=1,
            training_dtype="fp32",
        ),
        "end": node("PreviewAny", source=["train", 0]),
    }


_WEIGHTS = ("read the model's weights",)

SAMPLING = (
    Row("`KSampler`"),
    Row("`TPSampler`", sampler="TPSampler"),
    Row(
        "`KSampler`, every sampler, each with one of the models",
        each_value("sampler_name", SAMPLERS),
    ),
    Row(
        "`KSampler`, every scheduler, each with one of the models",
        each_value("scheduler", SCHEDULERS),
    ),
    Row("`KSampler`, denoise 0.5 from a latent", from_picture, HALF),
    Row("`KSamplerAdvanced`, two stages", _two_stages),
    Row("`SamplerCustom`, `KSamplerSelect`", _sampler_custom),
    Row(
        "`SamplerCustomAdvanced`, `RandomNoise`, `CFGGuider`",
        sampling=CFG,
        sampler="SamplerCustomAdvanced",
    ),
    Row(
        "every sampler node, each with one of the models: " + ", ".join(SAMPLER_NODES),
        _each_sampler_node,
        sampler="SamplerCustomAdvanced",
    ),
    Row(
        "every scheduler node, each with one of the models: " + ", ".join(SCHEDULER_NODES),
        _each_scheduler_node,
        sampler="SamplerCustomAdvanced",
    ),
    Row(
        "`SplitSigmas`, `SplitSigmasDenoise`, `SetFirstSigma`, "
        "`SamplingPercentToSigma`, `ExtendIntermediateSigmas`",
        _each_way_to_change_sigmas,
        sampler="SamplerCustomAdvanced",
    ),
    Row(
        "`AddNoise`, `DisableNoise`",
        all_of(from_picture, _add_noise),
        sampler="SamplerCustomAdvanced",
    ),
    Row(
        "`BasicGuider`",
        _guider("BasicGuider", conditioning=["positive", 0]),
        sampler="SamplerCustomAdvanced",
    ),
    Row(
        "`DualCFGGuider`",
        all_of(
            _more_captions,
            _guider(
                "DualCFGGuider",
                cond1=["positive", 0],
                cond2=["second", 0],
                negative=["negative", 0],
                cfg_conds=2.0,
                cfg_cond2_negative=1.5,
            ),
        ),
        sampler="SamplerCustomAdvanced",
        batched=True,
    ),
    Row(
        "`PerpNegGuider`",
        all_of(
            _more_captions,
            _guider(
                "PerpNegGuider",
                positive=["positive", 0],
                negative=["negative", 0],
                empty_conditioning=["second", 0],
                cfg=2.5,
            ),
        ),
        sampler="SamplerCustomAdvanced",
        batched=True,
    ),
    Row(
        "`DualModelGuider`, the second model a stock one",
        _dual_model,
        sampler="SamplerCustomAdvanced",
        expect={},
        newer=Same(),
    ),
    Row(
        "`KSampler`, the samplers of newer releases",
        each_value("sampler_name", NEWER_SAMPLERS),
        expect={},
        newer={"z_image": Same(), "flux": Same()},
    ),
    Row(
        "`SamplerLCM`, `SamplerSEEDS2`, `ManualSigmas`, `Ideogram4Scheduler`",
        _each_newer_node,
        sampler="SamplerCustomAdvanced",
        expect={},
        newer=Same(),
    ),
    Row("classifier-free guidance, captions of different lengths", sampling=CFG),
    Row(
        "classifier-free guidance, captions of equal length (one batch)",
        given("negative", length=12),
        CFG,
        batched=True,
    ),
    Row("odd latent sizes", sampling=replace(SMALL, width=72, height=88)),
    Row("high-resolution fix: `LatentUpscaleBy` and a second `KSampler`", _second_pass),
)

# Nodes that know no latents with a time axis, which Qwen-Image's and Wan's have.
_AREA = {
    "z_image": Same(),
    "flux": Same(),
    "flux2": Same(),
    "qwen_image": FailsInStock("sampler"),
    "wan": FailsInStock("sampler"),
}
_COMPOSITE = _AREA | {
    "qwen_image": FailsInStock("LatentCompositeMasked after latent"),
    "wan": FailsInStock("LatentCompositeMasked after latent"),
}

LATENTS = (
    Row("`EmptySD3LatentImage`, batch of 2", given("latent", batch_size=2), batched=True),
    Row("`RepeatLatentBatch`", on_latent("RepeatLatentBatch", amount=2), batched=True),
    Row(
        "`LatentBatchSeedBehavior`",
        all_of(
            given("latent", batch_size=2),
            on_latent("LatentBatchSeedBehavior", seed_behavior="fixed"),
        ),
        batched=True,
    ),
    Row(
        "`LatentFromBatch`",
        all_of(given("latent", batch_size=3), on_latent("LatentFromBatch", batch_index=1)),
    ),
    Row("`SetLatentNoiseMask`", _masked, HALF),
    Row(
        "`DifferentialDiffusion`",
        all_of(_masked, on_model("DifferentialDiffusion")),
        HALF,
    ),
    Row("`InpaintModelConditioning`", _inpaint_conditioning, replace(CFG, denoise=0.8)),
    Row("`LatentCompositeMasked`", _composite, HALF, expect=_COMPOSITE),
    Row("`VAEEncode`, `VAEDecode`", _picture_to_picture, HALF),
)

_NOT_READ = {
    "z_image": NoEffect(),
    "flux": Same(),
    "flux2": Same(),
    "qwen_image": NoEffect(),
    "wan": NoEffect(),
}
_REFERENCES = {
    "z_image": NoEffect(),
    "flux": Same(),
    "flux2": Same(),
    "qwen_image": Same(),
    "wan": NoEffect(),
}
_SKIPPED = {
    "z_image": NoEffect(),
    "flux": Same(),
    "flux2": Same(),
    "qwen_image": Same(),
    "wan": Same(),
}
_OMNI = {"z_image": Refused("sampler", ("ref_latents", "Omni", "ComfyUI"))}
_CONTROL = {"flux": Same(), "qwen_image": Same()}

CONDITIONING = (
    Row("`FluxGuidance`", on_positive("FluxGuidance", guidance=2.0), expect=_NOT_READ),
    Row("`FluxDisableGuidance`", on_positive("FluxDisableGuidance"), expect=_NOT_READ),
    Row("`ReferenceLatent`, one", _references(1), expect=_REFERENCES, newer=_OMNI),
    Row("`ReferenceLatent`, two", _references(2), expect=_REFERENCES, newer=_OMNI),
    *(
        Row(
            f"`FluxKontextMultiReferenceLatentMethod`, {method}",
            _references(2, method),
            expect=_REFERENCES,
            newer=_OMNI,
        )
        for method in ("offset", "index", "uxo/uno")
    ),
    Row(
        "`ConditioningCombine`",
        _two_captions("ConditioningCombine", "conditioning_1", "conditioning_2"),
        batched=True,
    ),
    Row(
        "`ConditioningAverage`",
        _two_captions(
            "ConditioningAverage",
            "conditioning_to",
            "conditioning_from",
            conditioning_to_strength=0.6,
        ),
    ),
    Row(
        "`ConditioningConcat`",
        _two_captions("ConditioningConcat", "conditioning_to", "conditioning_from"),
    ),
    Row(
        "`ConditioningSetArea`",
        _area("ConditioningSetArea", width=64, height=64, x=16),
        replace(SMALL, width=128),
        batched=True,
    ),
    Row(
        "`ConditioningSetAreaPercentage`",
        _area("ConditioningSetAreaPercentage", width=0.5, height=0.75, y=0.25),
        batched=True,
        expect=_AREA,
    ),
    Row(
        "`ConditioningSetAreaStrength`",
        _area("ConditioningSetAreaStrength", strength=0.4),
        batched=True,
    ),
    Row(
        "`ConditioningSetMask`",
        all_of(with_pictures, _area("ConditioningSetMask", mask=["mask", 0], strength=0.8)),
        batched=True,
    ),
    Row(
        "`ConditioningSetTimestepRange`",
        _area("ConditioningSetTimestepRange", start=0.0, end=0.5),
        batched=True,
    ),
    Row("`ConditioningZeroOut`", on_positive("ConditioningZeroOut")),
    Row(
        "`PairConditioningSetProperties`, `PairConditioningCombine`, "
        "`PairConditioningSetDefaultCombine`, `ConditioningTimestepsRange`",
        _pair_nodes,
        CFG,
        batched=True,
    ),
    Row("`ControlNetApplyAdvanced`", _controlnet(strength=0.8), CFG, expect=_CONTROL),
    Row(
        "`ControlNetApplyAdvanced`, part of the steps",
        _controlnet(start_percent=0.3, end_percent=0.8),
        CFG,
        expect=_CONTROL,
    ),
    Row("`ControlNetApplyAdvanced`, two ControlNets", _two_controlnets, CFG, expect=_CONTROL),
    Row("`ControlNetApplySD3`", _controlnet("ControlNetApplySD3"), CFG, expect=_CONTROL),
    Row(
        "`ControlNetApply`, `DiffControlNetLoader`",
        _controlnet_apply,
        expect={"flux": Same(), "qwen_image": FailsInStock("sampler")},
    ),
)

GUIDANCE = (
    *(
        Row(f"`{name}`", on_model(name, **inputs), CFG)
        for name, inputs in {
            "CFGNorm": {"strength": 0.9},
            "CFGZeroStar": {},
            "RescaleCFG": {},
            "APG": {"momentum": 0.3},
            "FreSca": {"freq_cutoff": 2},
            "Mahiro": {},
            "Epsilon Scaling": {"scaling_factor": 1.05},
            "TemporalScoreRescaling": {},
            "VideoLinearCFGGuidance": {},
            "VideoTriangleCFGGuidance": {},
        }.items()
    ),
    Row(
        "`RenormCFG`",
        on_model("RenormCFG", cfg_trunc=0.9),
        CFG,
        # It asks the model for its channels, which ComfyUI's class of Wan does not tell.
        expect=dict.fromkeys(("z_image", "flux", "flux2", "qwen_image"), Same())
        | {"wan": FailsInStock("sampler")},
    ),
    Row(
        "`CFGOverride`",
        on_model("CFGOverride", cfg=1.0, start_percent=0.0, end_percent=0.5),
        CFG,
        expect={},
        newer=Same(),
    ),
    Row(
        "`NAGuidance`",
        on_model("NAGuidance"),
        CFG,
        expect={},
        newer={
            "z_image": NoEffect(),
            "flux": Refused("sampler", ("NAGuidance", "nodes_nag", "attention layers")),
            "qwen_image": NoEffect(),
        },
    ),
    # Its singular vectors make more of what rounding differs in, at every step anew.
    Row("`TCFG`", on_model("TCFG"), replace(CFG, steps=2)),
    Row("`PerpNeg`", _perp_neg, CFG),
    Row("`LatentApplyOperationCFG`", _latent_operation, CFG),
    Row(
        "`SkipLayerGuidanceDiT`",
        on_model(
            "SkipLayerGuidanceDiT",
            double_layers="1",
            single_layers="0",
            start_percent=0.0,
            end_percent=1.0,
        ),
        CFG,
        expect=_SKIPPED,
    ),
    Row(
        "`SkipLayerGuidanceDiTSimple`",
        on_model("SkipLayerGuidanceDiTSimple", double_layers="0", single_layers="1"),
        CFG,
        expect=_SKIPPED,
    ),
    Row(
        "`SkipLayerGuidanceSD3`",
        on_model("SkipLayerGuidanceSD3", layers="0, 1", start_percent=0.0, end_percent=1.0),
        CFG,
        expect=_SKIPPED,
    ),
    Row(
        "`PerturbedAttentionGuidance`",
        on_model("PerturbedAttentionGuidance"),
        CFG,
        expect=NoEffect(),
    ),
    Row(
        "`SelfAttentionGuidance`",
        on_model("SelfAttentionGuidance"),
        # It leaves latents of 4 rows alone, which newer releases make of 64 pixels for FLUX.2.
        replace(CFG, width=128, height=128),
        expect={
            "z_image": FailsInStock("sampler"),
            "flux": FailsInStock("sampler"),
            "flux2": FailsInStock("sampler"),
            "qwen_image": NoEffect(),
            "wan": NoEffect(),
        },
    ),
)

_WAN_WINDOWS = {
    "z_image": Same(),
    "flux": Same(),
    "flux2": Same(),
    "qwen_image": NoEffect(),
    "wan": Same(),
}
_SCALE_ROPE = _WAN_WINDOWS
# Newer releases of ComfyUI have these models call patches of attention layers.
_ATTENTION_PATCHES = dict.fromkeys(
    ("flux", "flux2", "qwen_image", "wan"),
    Refused("sampler", ("Python function", "attention layers"), in_stock=False),
)
MODEL = (
    Row("`ModelSamplingFlux`", on_model("ModelSamplingFlux", width=64, height=64)),
    Row("`ModelSamplingAuraFlow`", on_model("ModelSamplingAuraFlow", shift=6.0)),
    Row("`ModelSamplingSD3`", on_model("ModelSamplingSD3")),
    Row("`ModelSamplingLTXV`", on_model("ModelSamplingLTXV")),
    Row("`ModelSamplingDiscrete`", on_model("ModelSamplingDiscrete", sampling="v_prediction")),
    Row("`ModelSamplingStableCascade`", on_model("ModelSamplingStableCascade")),
    Row(
        "`ModelSamplingContinuousEDM`",
        on_model("ModelSamplingContinuousEDM", sampling="cosmos_rflow", sigma_max=80.0),
    ),
    Row("`ModelSamplingContinuousV`", on_model("ModelSamplingContinuousV")),
    Row("`EasyCache`", on_model("EasyCache", reuse_threshold=3.0), replace(CFG, steps=8)),
    Row("`LazyCache`", on_model("LazyCache", reuse_threshold=3.0), replace(CFG, steps=8)),
    Row("`ContextWindowsManual`", _context_windows),
    Row(
        "`WanContextWindowsManual`",
        _wan_context_windows,
        expect=_WAN_WINDOWS,
    ),
    Row("`ScaleROPE`", on_model("ScaleROPE", scale_x=1.3, shift_y=2.0), expect=_SCALE_ROPE),
    Row("`TorchCompileModel`", on_model("TorchCompileModel"), without="TorchCompileModel"),
    Row("`ModelComputeDtype`, as loaded", on_model("ModelComputeDtype", dtype="fp32")),
    Row(
        "`ModelComputeDtype`, another",
        on_model("ModelComputeDtype", dtype="bf16"),
        expect=Refused("sampler", ("bfloat16", "ModelComputeDtype", "weight_dtype")),
    ),
    Row("`wanBlockSwap`", on_model("wanBlockSwap"), expect=NoEffect()),
    Row(
        "`ChromaRadianceOptions`",
        on_model("ChromaRadianceOptions", nerf_tile_size=16),
        expect=NoEffect(),
    ),
    Row(
        "`ModelAttentionBackend`, pytorch attention",
        on_model("ModelAttentionBackend", attention="pytorch attention"),
        expect={},
        newer=Same(),
    ),
    Row(
        "`FluxKVCache`",
        on_model("FluxKVCache"),
        expect={},
        # With Wan it fails in stock.
        newer=dict.fromkeys(("z_image", "flux", "flux2", "qwen_image"), NoEffect()),
    ),
    Row(
        "`FluxKVCache`, with reference images",
        all_of(_references(1), on_model("FluxKVCache")),
        expect={},
        newer={
            # What is stored fails in stock where both conditions of a step fit into one batch.
            "flux": Refused("sampler", ("nodes_flux", "Remove or bypass"), in_stock=False),
            "flux2": Refused("sampler", ("nodes_flux", "Remove or bypass"), in_stock=False),
            "qwen_image": Refused("sampler", ("nodes_flux", "Remove or bypass")),
        },
    ),
    Row("`HyperTile`", on_model("HyperTile"), expect=NoEffect(), newer=_ATTENTION_PATCHES),
    Row(
        "`TomePatchModel`", on_model("TomePatchModel"), expect=NoEffect(), newer=_ATTENTION_PATCHES
    ),
    Row(
        "`PatchModelAddDownscale`",
        on_model("PatchModelAddDownscale", end_percent=1.0),
        expect=NoEffect(),
    ),
    Row(
        "`HypernetworkLoader`",
        on_model("HypernetworkLoader"),
        expect=NoEffect(),
        newer=_ATTENTION_PATCHES,
    ),
    Row("`FreeU`", on_model("FreeU"), expect=FailsInStock("FreeU after model")),
    Row("`FreeU_V2`", on_model("FreeU_V2"), expect=FailsInStock("FreeU_V2 after model")),
    Row(
        "`QwenImageDiffsynthControlnet`",
        _model_patch(0, "QwenImageDiffsynthControlnet"),
        expect={"qwen_image": Same()},
    ),
    Row(
        "`USOStyleReference`",
        _model_patch(1, "USOStyleReference"),
        expect={"flux": Same()},
    ),
)

WEIGHTS = (
    *(
        Row(f"`{name}`", _merged(name), expect=Refused("sampler", ("ModelMerge",)))
        for name in ("ModelMergeSimple", "ModelMergeAdd", "ModelMergeSubtract", "ModelMergeBlocks")
    ),
    Row(
        "`ModelMergeFlux1`",
        _merged("ModelMergeFlux1"),
        expect={"flux": Refused("sampler", ("ModelMerge",))},
    ),
    Row(
        "`ModelMergeQwenImage`",
        _merged("ModelMergeQwenImage"),
        expect={"qwen_image": Refused("sampler", ("ModelMerge",))},
    ),
    Row(
        "`ModelMergeWAN2_1`",
        _merged("ModelMergeWAN2_1"),
        expect={"wan": Refused("sampler", ("ModelMerge",))},
    ),
    Row(
        "any of them, our model as the second",
        _merged_into_stock,
        expect=Refused("merge", _WEIGHTS),
    ),
    Row("`ModelSave`", _saved("ModelSave"), expect=Refused("saved", _WEIGHTS)),
    Row("`UNetSelfAttentionMultiply`", on_model("UNetSelfAttentionMultiply"), expect=NoEffect()),
    Row("`UNetCrossAttentionMultiply`", on_model("UNetCrossAttentionMultiply"), expect=NoEffect()),
    Row(
        "`UNetTemporalAttentionMultiply`",
        on_model("UNetTemporalAttentionMultiply"),
        expect=NoEffect(),
    ),
    Row(
        "`LoraSave`",
        _lora_save,
        expect=Refused("saved", _WEIGHTS),
        newer=Refused("saved", ("is to be merged",)),
    ),
    Row("`TrainLoraNode`", _train, expect=Refused("train", ("training",), in_stock=False)),
)

SECTIONS: dict[str, tuple[Row, ...]] = {
    "Sampling": SAMPLING,
    "Latents": LATENTS,
    "Conditioning": CONDITIONING,
    "Guidance": GUIDANCE,
    "Model": MODEL,
    "Weights": WEIGHTS,
}
ROWS = tuple(row for rows in SECTIONS.values() for row in rows)

_LOADS = "gives a stock model; `TPLoadDiffusionModel` takes its place"
_LORA = "LoRA; `tests/comfy/test_lora.py`"
_SAVES = "reads weights: clear error, as `ModelSave`"
_MERGES = "reads weights: clear error, as `ModelMergeSimple`; made for another model"
_BYPASSES = "code inside the model: clear error; `tests/comfy/test_patcher.py`"
_OF_OTHER_MODELS = _words(
    """
    ARVideoI2V AnimaLLLiteApply GetICLoRAParameters HiDreamO1PatchSeamSmoothing LTXVContextWindows
    LTXVDualCFGGuider LTXVDurationPredictor LTXVModalityGuidance LTXVReferenceAudio
    LTXVSpatioTemporalGuidance RTDETR_detect SAM3_Detect SAM3_VideoTrack SDPoseKeypointExtractor
    SUPIRApply SamplerARVideo SeedVR2Conditioning TripoSplatSamplingPreview VOIDSampler
    VOIDWarpedNoiseSource WanInfiniteTalkToVideo WanUni3CControlnetApply
    """
)
_CONTROLS = (
    "changes what a ControlNet is given; its residuals are as with `ControlNetApplyAdvanced`"
)

# The other nodes with a model, sampler, sigmas, guider, noise or ControlNet, and why they have no
# workflow here.
ELSEWHERE = {
    "FlipSigmas": "turns sigmas round; no model in it",
    "CheckpointLoader": _LOADS,
    "CheckpointLoaderSimple": _LOADS,
    "DiffusersLoader": _LOADS,
    "ImageOnlyCheckpointLoader": _LOADS,
    "UNETLoader": _LOADS,
    "unCLIPCheckpointLoader": _LOADS,
    "LoraLoader": _LORA,
    "LoraLoaderModelOnly": _LORA,
    "LoraModelLoader": _LORA,
    "CheckpointSave": _SAVES,
    "ImageOnlyCheckpointSave": _SAVES,
    "ControlNetInpaintingAliMamaApply": _CONTROLS,
    "SetUnionControlNetType": _CONTROLS,
    "ModelPatchLoader": "its patches: `QwenImageDiffsynthControlnet`, `ZImageFunControlnet`, "
    "`USOStyleReference`",
    "ModelMergeAuraflow": _MERGES,
    "ModelMergeCosmos14B": _MERGES,
    "ModelMergeCosmos7B": _MERGES,
    "ModelMergeCosmosPredict2_14B": _MERGES,
    "ModelMergeCosmosPredict2_2B": _MERGES,
    "ModelMergeLTXV": _MERGES,
    "ModelMergeMochiPreview": _MERGES,
    "ModelMergeSD1": _MERGES,
    "ModelMergeSD2": _MERGES,
    "ModelMergeSD35_Large": _MERGES,
    "ModelMergeSD3_2B": _MERGES,
    "ModelMergeSDXL": _MERGES,
    "LoraLoaderBypass": _BYPASSES,
    "LoraLoaderBypassModelOnly": _BYPASSES,
    "ModelMergeKrea2": "reads weights: clear error, as `ModelMergeSimple`",
    "ZImageFunControlnet": "a ControlNet that is a model patch (newer releases): ✓ on Z-Image "
    "(`tests/comfy/test_model_patches.py`)",
    **dict.fromkeys(_OF_OTHER_MODELS, "made for another model (newer releases)"),
    "MultiGPU_WorkUnits": "copies the model to other GPUs: clear error where there are any",
    "SelectModelDevice": "chooses ComfyUI's device; ours is chosen by `devices`",
    "ModelNoiseScale": "another model sampling, which is ComfyUI's own code",
    "MiniMaxH3SigmaShift": "another model sampling, which is ComfyUI's own code",
    "WanAnimate2Cache": "keeps what is kept on the ranks anyway (Wan Animate 2): no effect "
    "(`tests/comfy/test_video.py`)",
    "QwenImage21Cache": "where ComfyUI keeps its keys and values (Qwen-Image-2.1): no effect",
}
