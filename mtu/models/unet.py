"""The upcycled UNet: a stock UNet of Stable Diffusion (1.5 or XL) with tasks.

The class connects the modules beside this one: layers, routers, folding and files live there.
"""

import contextlib
import functools
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import UNet2DConditionModel

# Pipelines accept a UNet class from outside diffusers only if its module also exposes this name, unused here.
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

import mtu_kernels
from mtu.compat import parameter_access
from mtu.compat.plain_linear import has_unmodified_call
from mtu.compat.private_interfaces import expand_adapter_block_scales, register_stock_arguments_
from mtu.experts import ExpertConfig, NormMode, stock_config
from mtu.models import partial_checkpoints, pretrained
from mtu.models.conv_in import TaskConvIn
from mtu.models.ffn import TASK_CONTEXT_KEY, Backend, RoutedFeedForward, RoutedTransformerBlock, check_unet_upcyclable
from mtu.models.folding import stock_unet_and_folded_tensors
from mtu.models.gathering import can_precompute_routing, find_consecutive_blocks, gather_task_values
from mtu.models.norm import TaskAffineTable
from mtu.models.router import (
    Router,
    RoutingTable,
    TaskContext,
    TaskEmbeddings,
    precomputed_tables_context,
    routing_table_parameter_ids,
)
from mtu.models.settings import copy_settings_
from mtu.models.task_rows import PerTaskModule, check_per_task_modules, read_task_rows, write_task_rows_
from mtu.tasks import TaskSpec, as_task_specs

__all__ = ["MTUUNet2DConditionModel"]


class MTUUNet2DConditionModel(UNet2DConditionModel):
    """A `UNet2DConditionModel` that serves several tasks with the parameters and FLOPs of one.

    The feed-forward networks consist of experts that per-task routers weigh. Each task has its own LayerNorms before
    them and its own input convolution. The other layers are those of the stock model. `mtu.upcycle` and
    `from_pretrained` build such a model.

    Args:
        tasks: task specs, their dictionaries, or names of the four built-in tasks.
        num_experts, top_k, expert_ratio, norm, routing_scale, router_width: see `ExpertConfig`.
        routers_dropped: whether the model has routing tables in the place of routers (see `drop_routers_`).
        **stock: the arguments of `UNet2DConditionModel`; `in_channels` stays that of the latents.

    Raises:
        ValueError: the tasks or the expert layout are not valid, or the feed-forward networks cannot be upcycled.

    Source: MTU (arXiv 2503.11905).
    """

    conv_in: TaskConvIn
    task_embedding: TaskEmbeddings | None

    # diffusers compares these with the names of classes.
    _repeated_blocks: ClassVar = ["RoutedTransformerBlock"]
    # `from_pretrained(torch_dtype=…)` must not round routing tables (`RoutingTable.weights`).
    _keep_in_fp32_modules: ClassVar = ["weights"]
    _no_split_modules: ClassVar = ["RoutedTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]

    def __init__(
        self,
        *,
        tasks: Iterable[TaskSpec | dict[str, Any] | str],
        num_experts: int,
        top_k: int | None = None,
        expert_ratio: float,
        norm: NormMode = "task",
        routing_scale: float,
        router_width: int,
        routers_dropped: bool = False,
        **stock: Any,
    ) -> None:
        specs = as_task_specs(tasks)
        config = ExpertConfig(num_experts, top_k, expert_ratio, norm, routing_scale, router_width)
        super().__init__(**stock)  # registers the stock part of the configuration
        self.register_to_config(tasks=[spec.to_dict() for spec in specs])
        check_unet_upcyclable(self)
        # The constructor of diffusers builds stock blocks of a fixed class, so they are replaced after it has run.
        for transformer in self.modules():
            if isinstance(transformer, Transformer2DModel):
                for index, block in enumerate(transformer.transformer_blocks):
                    transformer.transformer_blocks[index] = RoutedTransformerBlock(
                        block, config, len(specs), routers_dropped
                    )
        stock_conv_in = cast(nn.Conv2d, self.get_submodule("conv_in"))
        self.conv_in = TaskConvIn(
            [spec.condition_channels for spec in specs],
            stock_conv_in.in_channels,
            stock_conv_in.out_channels,
            stock_conv_in.kernel_size[0],
        )
        self.task_embedding = None if routers_dropped else TaskEmbeddings(len(specs), router_width)
        # The blocks are found once, as a search through thousands of modules takes longer than gathering. A block that
        # is put in later gathers its own values.
        self._consecutive_blocks = find_consecutive_blocks(self, self.routed_blocks_by_name())
        # Routing tables keep their dtype by themselves. With this attribute, diffusers' `.to` would warn at each call.
        self._keep_in_fp32_modules = None
        self.freeze_stock_parameters_()

    # ---------------------------------------------------------------------------------------------------- tasks

    @property
    def tasks(self) -> tuple[TaskSpec, ...]:
        """The tasks, in the order of their ids."""
        return as_task_specs(self.config.tasks)

    @property
    def expert_config(self) -> ExpertConfig:
        """The expert layout."""
        return ExpertConfig.from_config(self.config)

    def task_index(self, name: str) -> int:
        """The id of a task, which is its position in `tasks`.

        Raises:
            ValueError: this model has no task of that name.
        """
        names = [spec.name for spec in self.tasks]
        if name not in names:
            raise ValueError(f"Unknown task {name!r}: this model has {names}.")
        return names.index(name)

    def task_ids(self, names: str | Sequence[str], device: torch.device | str | None = None) -> Tensor:
        """The `task_ids` argument for a batch: (B,) int64 on the model's device, one id per name.

        Raises:
            ValueError: this model has no task of that name.
        """
        indices = [self.task_index(name) for name in ([names] if isinstance(names, str) else names)]
        return torch.tensor(indices, dtype=torch.int64, device=device or self.task_ids_device)

    @property
    def task_ids_device(self) -> torch.device:
        """The device that `task_ids` makes tensors on."""
        return self.conv_in.channel_counts.device

    def add_task(self, spec: TaskSpec, init_from: str | None = None) -> int:
        """Append a task; all other tasks stay bit-identical.

        New, longer parameters replace those with one row per task, so build the optimizer afterwards.

        Args:
            spec: the new task.
            init_from: the task whose embedding, norms and input convolution are the start values; None: the first.

        Returns:
            The id of the new task.

        Raises:
            TypeError: `spec` is not a TaskSpec.
            ValueError: a task of that name exists, `init_from` does not exist, or the routers were dropped.
        """
        if not isinstance(spec, TaskSpec):
            raise TypeError(f"add_task takes a TaskSpec, but got {type(spec).__name__}.")
        source = 0 if init_from is None else self.task_index(init_from)
        if spec.name in [task.name for task in self.tasks]:
            raise ValueError(f"A task named {spec.name!r} exists already; expected a new name.")
        if self.task_embedding is None:
            raise ValueError("No task can be added once the routers are dropped: expected a model with routers.")
        self._check_changeable("add_task")
        self._select_tasks_((*self.tasks, spec), [*range(len(self.tasks)), source])
        return len(self.tasks) - 1

    def remove_task(self, name: str) -> None:
        """Remove a task and its rows; later tasks move up by one id, their values unchanged.

        Raises:
            ValueError: the task is unknown, or it is the only one.
        """
        index, specs = self.task_index(name), self.tasks
        if len(specs) == 1:
            raise ValueError(f"{name!r} is the only task of this model: a model needs at least one.")
        self._check_changeable("remove_task")
        kept = [i for i in range(len(specs)) if i != index]
        self._select_tasks_(tuple(specs[i] for i in kept), kept)

    def per_task_modules_by_name(self) -> dict[str, nn.Module]:
        """The modules whose parameters hold one row per task, by name.

        A router has no rows of its own: its per-task part is the task embedding.
        """
        blocks = self.routed_blocks_by_name()
        modules: dict[str, nn.Module] = {f"{name}.norm3": block.norm3 for name, block in blocks.items()}
        modules["conv_in"] = self.conv_in
        if self.task_embedding is not None:
            modules["task_embedding"] = self.task_embedding
        else:
            modules |= {f"{name}.ff.router": block.ff.router for name, block in blocks.items()}
        return modules

    def _check_changeable(self, action: str) -> None:
        """Raise a ValueError unless new per-task tensors would reach the calls of this model."""
        parameter_access.check_not_offloaded(self, action)
        check_per_task_modules(self.per_task_modules_by_name(), action)

    def _select_tasks_(self, specs: tuple[TaskSpec, ...], rows: Sequence[int]) -> None:
        """Make `specs` the tasks; the new task i starts from the old row `rows[i]`."""
        for module in self.per_task_modules_by_name().values():
            if isinstance(module, TaskConvIn):
                module.select_task_rows_(rows, [spec.condition_channels for spec in specs])
            elif isinstance(module, PerTaskModule):
                module.select_task_rows_(rows)
        self._set_task_specs_(specs)

    def _set_task_specs_(self, specs: Iterable[TaskSpec]) -> None:
        self.register_to_config(tasks=[spec.to_dict() for spec in specs])
        # Precomputed and cached tables belong to the old tasks, so routers run again, also within
        # `precomputed_routing_context`.
        for router in self.routers():
            router.discard_precomputed()
            router.clear_cache()

    # -------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: tuple[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: tuple[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        task_ids: Tensor | None = None,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict the noise of each sample under its own task.

        Args:
            sample: (B, c, H, W) noisy latents, followed by the condition latents of tasks that take an image. Missing
                channels count as zero, and channels beyond a task's own are ignored.
            task_ids: (B,) int64, or one id (1,) for all samples; None: all samples are of the first task.
            Others: as in `UNet2DConditionModel.forward`.

        Returns:
            `UNet2DConditionOutput` with sample (B, out_channels, H, W), or a tuple.

        Raises:
            ValueError: task_ids have another shape or type, or are out of range (which is checked on CPUs only).
        """
        task_ids = self.prepare_task_ids(task_ids, sample)
        embedding = self.task_embedding_weight(sample.device)
        context = TaskContext(task_ids, embedding, gather_task_values(self._consecutive_blocks, task_ids, embedding))
        # The stock forward calls `conv_in` again, without task_ids: that second call returns its argument.
        return super().forward(
            self.conv_in(sample, task_ids, channels_last=self.is_channels_last),
            timestep,
            encoder_hidden_states,
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs={**(cross_attention_kwargs or {}), TASK_CONTEXT_KEY: context},
            added_cond_kwargs=added_cond_kwargs,
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=return_dict,
        )

    @property
    def is_channels_last(self) -> bool:
        """Whether the weights of convolutions, and so their outputs, are in the channels-last memory format."""
        weight = getattr(self.conv_out, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 4:
            return False  # The layer is wrapped or sharded. The memory format affects speed alone.
        return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()

    def prepare_task_ids(self, task_ids: Tensor | None, sample: Tensor) -> Tensor:
        """Check `task_ids` and bring them to the form that the layers use.

        Args:
            task_ids: as in `forward`.
            sample: as in `forward`.

        Returns:
            (B,) int64 on the device of `sample`.

        Raises:
            ValueError: as in `forward`.
        """
        batch = sample.shape[0]
        if task_ids is None:
            return torch.zeros(batch, dtype=torch.int64, device=sample.device)
        if not isinstance(task_ids, Tensor) or task_ids.dtype != torch.int64 or task_ids.dim() != 1:
            given = f"{task_ids.dtype} {tuple(task_ids.shape)}" if isinstance(task_ids, Tensor) else repr(task_ids)
            raise ValueError(f"task_ids must be an int64 tensor of shape ({batch},), but got {given}.")
        if task_ids.shape[0] not in (1, batch):
            raise ValueError(f"task_ids must have one id for each of {batch} samples, but got {task_ids.shape[0]}.")
        # Values are checked on the CPU alone: on a GPU the check would synchronise at every call.
        if task_ids.device.type == "cpu" and mtu_kernels.arguments.has_values(task_ids):
            wrong = [i for i in task_ids.tolist() if not 0 <= i < len(self.config.tasks)]
            if wrong:
                raise ValueError(f"task_ids must be in [0, {len(self.config.tasks)}), but got {wrong[0]}.")
        return task_ids.to(sample.device).expand(batch)

    def task_embedding_weight(self, device: torch.device) -> Tensor | None:
        """The weight (T, W) of the task embedding on a device; None once the routers are dropped."""
        embedding = self.task_embedding
        if embedding is None:
            return None
        # Under offloading, the weight has values within its module's forward only.
        return embedding.weight if has_unmodified_call(embedding) else embedding().to(device)

    # ------------------------------------------------------------------------------- parameters, routers, backend

    def routed_blocks_by_name(self) -> dict[str, RoutedTransformerBlock]:
        """The transformer blocks with a routed feed-forward network, by name, in the order of the state dict."""
        return {name: module for name, module in self.named_modules() if isinstance(module, RoutedTransformerBlock)}

    def routed_feed_forwards(self) -> list[RoutedFeedForward]:
        """The routed feed-forward networks, in the order of the state dict."""
        return [block.ff for block in self.routed_blocks_by_name().values()]

    def routers(self) -> list[Router]:
        """The routers, in the order of the state dict; none once they are dropped."""
        return [layer.router for layer in self.routed_feed_forwards() if isinstance(layer.router, Router)]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that training updates: experts, routers, task embedding, task norms and input convolutions."""
        return [parameter for _, parameter in self.named_trainable_parameters()]

    def named_trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """`trainable_parameters` with their names."""
        owners = (RoutedFeedForward, TaskAffineTable, TaskConvIn, TaskEmbeddings)
        trainable = {
            id(p) for m in self.modules() if isinstance(m, owners) for p in m.parameters()
        } - routing_table_parameter_ids(self)
        return [(name, p) for name, p in parameter_access.named_parameters_without_adapters(self) if id(p) in trainable]

    def requires_grad_(self, requires_grad: bool = True) -> "MTUUNet2DConditionModel":
        """Set `requires_grad` as in torch, except for the tables of dropped routers and for integers."""
        fixed = routing_table_parameter_ids(self)
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad and parameter.is_floating_point() and id(parameter) not in fixed)
        return self

    def freeze_stock_parameters_(self) -> None:
        """Set `requires_grad` for the `trainable_parameters` alone."""
        self.requires_grad_(False)
        for parameter in self.trainable_parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # Quantized parameters are integers.

    @torch.no_grad()
    def router_weights(self) -> Tensor:
        """The routing weights (layers, T, E) float32, with zeros for inactive experts."""
        # Under group offloading to disk, only calls of whole blocks load the parameters of routers.
        unet = (
            parameter_access.copy_unless_in_memory(self) if parameter_access.is_group_offloaded_to_disk(self) else self
        )
        embedding = unet.task_embedding_weight(unet.task_ids_device)
        routers = [layer.router for layer in unet.routed_feed_forwards()]
        tables = [parameter_access.call_with_whole_parameters(router, embedding) for router in routers]
        return torch.stack([mtu_kernels.dense_weights(table, self.config.num_experts) for table in tables]).clone()

    @torch.no_grad()
    def drop_routers_(self) -> None:
        """Replace the routers and the task embedding by their output, a (T, K) table per layer.

        The model's output stays the same. Afterwards, routers cannot be trained and no task can be added.

        Raises:
            ValueError: the routers were dropped already, or the model is under group offloading.
        """
        if self.task_embedding is None:
            raise ValueError("The routers of this model were dropped already; expected a model with routers.")
        parameter_access.check_not_group_offloaded(self, "drop_routers_")
        embedding = self.task_embedding_weight(self.task_ids_device)
        for layer in self.routed_feed_forwards():
            table = RoutingTable.from_routing(self.expert_config, layer.router(embedding))
            layer.router = table.train(layer.training)
        self.task_embedding = None
        self.register_to_config(routers_dropped=True)

    def clear_routing_cache(self) -> None:
        """Clear the cached routing tables.

        The cache notices changes by version counters and samples of the values. Call this after changes that neither
        can show.
        """
        for router in self.routers():
            router.clear_cache()

    @contextlib.contextmanager
    def precomputed_routing_context(self) -> Iterator[None]:
        """Run the routers once, now, instead of at each call within this context.

        This serves calls without gradients in eval mode. Other calls run the routers themselves, and so do models that
        offloading moves meanwhile. Changes to routers and task embedding take effect in the next context.

        Example:
            >>> with torch.no_grad(), unet.precomputed_routing_context():
            ...     for timestep in scheduler.timesteps:
            ...         noise = unet(latents, timestep, text, task_ids=task_ids).sample
        """
        blocks = {} if self.training or torch.is_grad_enabled() else self.routed_blocks_by_name()
        routers = [block.ff.router for block in blocks.values() if isinstance(block.ff.router, Router)]
        if not routers or not can_precompute_routing(self, blocks):
            yield
            return
        with precomputed_tables_context(routers, self.task_embedding_weight(self.task_ids_device)):
            yield

    def set_backend(self, backend: Backend) -> None:
        """Choose how routed feed-forward networks are computed: "auto", "eager", "triton", "cpp" or "reference".

        Each call checks device, dtype and shape, so you may choose a GPU backend before moving the model.

        Args:
            backend: the name of the backend; "auto" takes the fastest one for each call.

        Raises:
            ValueError: no backend has this name.
            RuntimeError: the backend is not part of this installation.
        """
        mtu_kernels.check_backend(backend)
        for layer in self.routed_feed_forwards():
            layer.backend = backend

    def set_adapters(self, adapter_names: list[str] | str, weights: Any = None) -> None:
        """Set the active adapters and their scales, as in diffusers.

        Args:
            adapter_names: one name or several.
            weights: one scale or a list of them, each a number or by block, {"down": 0.9, "up": {"block_1": 0.6}}.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        weights = weights if isinstance(weights, list) else [weights] * len(names)
        super().set_adapters(names, list(expand_adapter_block_scales(self, weights)))

    # ------------------------------------------------------------------------------------ saving, loading, export

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """Load a model that `save_pretrained` saved; the arguments are those of diffusers.

        Raises:
            ValueError: the checkpoint is of another architecture, or a file is truncated or altered.
        """
        return pretrained.load_strictly(cls, super().from_pretrained, pretrained_model_name_or_path, kwargs)

    @functools.wraps(UNet2DConditionModel.save_pretrained)
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super().save_pretrained).bind(*args, **kwargs).arguments
        parameter_access.check_saveable(self, "save_pretrained")
        save = functools.partial(UNet2DConditionModel.save_pretrained, parameter_access.copy_unless_in_memory(self))
        pretrained.save_atomically(save, given)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """Load a state dict, as in torch.

        Raises:
            ValueError: offloading keeps some of these tensors elsewhere, so that calls would not use the loaded values.
        """
        parameter_access.check_loadable(self, state_dict, "load_state_dict", assign=assign)
        return super().load_state_dict(state_dict, strict, assign)

    def save_task(self, directory: str | os.PathLike, name: str) -> None:
        """Save the tensors of one task alone: its embedding, norms and input convolution.

        Args:
            directory: the folder, which may also contain other tasks.
            name: the task.
        """
        index = self.task_index(name)
        rows = self._task_rows(index)
        rows["conv_in.weight"] = rows["conv_in.weight"][:, : self.conv_in.channels_per_task[index]]
        partial_checkpoints.write_task_checkpoint(directory, self.tasks[index], rows, self._architecture())

    def load_task(self, directory: str | os.PathLike, replace: bool = False, name: str | None = None) -> int:
        """Load a task that `save_task` saved.

        The files contain neither experts nor routers, so load the task into the model that it was trained with.

        Args:
            directory: the folder that `save_task` wrote into.
            replace: whether to overwrite a task of the same name; otherwise the task must be new.
            name: the task to load; None: the only one of the folder.

        Returns:
            The id of the task.

        Raises:
            ValueError: the task is of another architecture, a file is truncated or altered, the folder has no such
                task, or the model has a task of that name and `replace` is false.
        """
        self._check_changeable("load_task")
        spec, rows = partial_checkpoints.read_task_checkpoint(directory, name, self._architecture())
        expected = {key: row.shape for key, row in self._task_rows(0).items()}
        width = self.conv_in.latent_channels + spec.condition_channels
        conv_shape = expected["conv_in.weight"]
        expected["conv_in.weight"] = torch.Size((conv_shape[0], width, *conv_shape[2:]))
        partial_checkpoints.check_tensor_names_and_shapes(expected, rows, directory)
        own = {task.name: task for task in self.tasks}
        if spec.name not in own:
            index = self.add_task(spec)
        elif not replace:
            raise ValueError(f"A task named {spec.name!r} exists already: pass replace=True to overwrite it.")
        elif own[spec.name].condition_channels != spec.condition_channels:
            raise ValueError(
                f"Task {spec.name!r} has {own[spec.name].condition_channels} condition channels here, "
                f"but {spec.condition_channels} in {directory}."
            )
        else:
            index = self.task_index(spec.name)
        write_task_rows_(self.per_task_modules_by_name(), index, rows)
        self._set_task_specs_({**own, spec.name: spec}.values())
        return index

    def save_trained(self, directory: str | os.PathLike) -> None:
        """Save the trained parameters alone; `mtu.load_trained` loads them into the same base model.

        Args:
            directory: the folder; made if it does not exist.

        Raises:
            ValueError: the routers were dropped, adapters are loaded, or weights are quantized or on the meta device.
        """
        if self.task_embedding is None:
            raise ValueError(
                "Trained parameters include the routers, which were dropped: expected a model with routers."
            )
        parameter_access.check_plain_layers(self, "save_trained")
        parameter_access.check_has_values(self, "save_trained")
        tensors = parameter_access.state_dict_with_offloaded_values(
            self, {name for name, _ in self.named_trainable_parameters()}
        )
        partial_checkpoints.write_tasks_layout_and_trained_parameters(
            directory, self.tasks, self.expert_config, stock_config(self), tensors
        )

    def export_task(self, name: str, *, prune: bool = False) -> UNet2DConditionModel:
        """Make a stock diffusers UNet that computes one task with the same output.

        The new UNet has tensors of its own, and all its parameters require gradients. Settings (attention processors,
        FreeU, gradient checkpointing, …) are copied.

        Args:
            name: the task.
            prune: whether to drop the hidden units of experts that top-k routing leaves inactive. Use the result in
                memory or for graph export: no stock configuration can describe its narrower FFNs.

        Returns:
            A `UNet2DConditionModel` with `in_channels` = 4 + the task's condition channels.

        Raises:
            ValueError: the task is unknown; the hidden width is not that of a stock FFN and `prune` is false; the model
                has adapters, quantized or sharded tensors; or settings such as hooks cannot be copied.
        """
        index = self.task_index(name)
        parameter_access.check_plain_layers(self, "export_task")
        source = parameter_access.copy_unless_in_memory(self, in_compute_dtype=True)
        embedding = None if source.task_embedding is None else source.task_embedding.weight
        exported, state = stock_unet_and_folded_tensors(source, index, embedding, prune=prune)
        copy_settings_(self, exported)
        exported.load_state_dict({key: tensor.clone() for key, tensor in state.items()}, assign=True)
        if self.is_channels_last:
            # Neither torch nor diffusers declares this argument.
            exported.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return exported

    def _architecture(self) -> partial_checkpoints.ModelArchitecture:
        return partial_checkpoints.ModelArchitecture(
            stock_config(self), self.expert_config, self.task_embedding is None
        )

    def _task_rows(self, index: int) -> dict[str, Tensor]:
        """The tensors that belong to task id `index` alone, by the names of the parameters of all tasks."""
        modules = self.per_task_modules_by_name()
        check_per_task_modules(modules, "reading a task's rows")
        parameter_access.check_has_values(self, "Reading a task's rows")
        return read_task_rows(self, modules, index)


register_stock_arguments_(MTUUNet2DConditionModel)

# diffusers writes the module of the class into `model_index.json`, where the package should stand, not this file.
MTUUNet2DConditionModel.__module__ = "mtu"
