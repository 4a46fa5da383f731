"""Every error code of the wire contract, with its class and meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from agent import errors
from agent.errors import ComputeError
from agent.messages.commands import MAX_COMMAND_BYTES


@dataclass(frozen=True, slots=True)
class ErrorCode:
    """One code of the contract: the class that decides whether a retry can help, and what it means."""

    code: str
    error: type[ComputeError]
    meaning: str

    @property
    def retryable(self) -> bool:
        """Whether the same request, sent again later, can succeed."""
        return self.error.retryable


ERROR_CODES: Final[tuple[ErrorCode, ...]] = (
    # What is wrong with the command itself.
    ErrorCode("too_large", errors.InvalidArgument, f"The body is larger than {MAX_COMMAND_BYTES} bytes."),
    ErrorCode("bad_json", errors.InvalidArgument, "The body is not JSON, or is nested too deeply."),
    ErrorCode("bad_envelope", errors.InvalidArgument, "The body is JSON but no CloudEvents 1.0 object."),
    ErrorCode("unknown_type", errors.InvalidArgument, "No command has this `type`."),
    ErrorCode("unknown_field", errors.InvalidArgument, "The command has a field that the contract does not know."),
    ErrorCode("invalid_argument", errors.InvalidArgument, "A field has the wrong type or a value out of its range."),
    ErrorCode("wrong_host", errors.InvalidArgument, "`host` names another host than the one that got the command."),
    ErrorCode("spec_too_large", errors.InvalidArgument, "The spec is too large for the domain's metadata."),
    ErrorCode("definition_refused", errors.InvalidArgument, "The hypervisor refuses the domain's definition."),
    ErrorCode("definition_too_large", errors.InvalidArgument, "The domain's definition is too large to be sent."),
    ErrorCode("network_config_not_json", errors.InvalidArgument, "A config-drive needs its network_config as JSON."),
    ErrorCode("invalid_instance_id", errors.InvalidArgument, "The driver was given an id that is no lower-case UUID."),
    ErrorCode("unknown_fake_label", errors.InvalidArgument, "Driver fake: there is no label of this name."),
    ErrorCode("bad_fake_label", errors.InvalidArgument, "Driver fake: the label's value cannot be used."),
    ErrorCode("unknown_backend", errors.InvalidArgument, "The host has no storage back end of this name."),
    # What stands against it.
    ErrorCode("conflict", errors.Conflict, "Another command was accepted under this id before."),
    ErrorCode("stale_generation", errors.StaleGeneration, "`generation` is lower than the instance's; details has it."),
    ErrorCode("expired", errors.Expired, "`expirytime` passed before work began."),
    ErrorCode("cancelled", errors.Cancelled, "A command cancelled the operation; what it had done was undone."),
    ErrorCode("unknown_instance", errors.NotFound, "No instance with this id is on this host."),
    ErrorCode("unknown_operation", errors.NotFound, "No operation with this id is in the journal, or to be cancelled."),
    ErrorCode("not_found", errors.NotFound, "The hypervisor has no such domain."),
    ErrorCode("instance_exists", errors.AlreadyExists, "An instance with this id is on this host already."),
    ErrorCode("name_taken", errors.AlreadyExists, "Another instance or a foreign domain has this name."),
    ErrorCode("already_exists", errors.AlreadyExists, "The hypervisor has a domain with this name or id."),
    ErrorCode("instance_running", errors.FailedPrecondition, "The instance runs and must be stopped first."),
    ErrorCode("instance_not_running", errors.FailedPrecondition, "The instance does not run; start it first."),
    ErrorCode("instance_paused", errors.FailedPrecondition, "The instance is paused; resume it first."),
    ErrorCode("instance_not_paused", errors.FailedPrecondition, "The instance neither runs nor is paused; start it."),
    ErrorCode("instance_suspended", errors.FailedPrecondition, "The instance is suspended to disk; start it first."),
    ErrorCode("instance_rescued", errors.FailedPrecondition, "The instance is rescued; `instance.unrescue` ends that."),
    ErrorCode("instance_not_rescued", errors.FailedPrecondition, "The instance is not rescued."),
    ErrorCode(
        "instance_shelved", errors.FailedPrecondition, "The instance is shelved; `instance.unshelve` returns it."
    ),
    ErrorCode("instance_not_shelved", errors.FailedPrecondition, "The instance is not shelved."),
    ErrorCode("instance_soft_deleted", errors.FailedPrecondition, "The instance is deleted, but can be restored yet."),
    ErrorCode("instance_not_soft_deleted", errors.FailedPrecondition, "There is no soft delete to be taken back."),
    ErrorCode("resize_pending", errors.FailedPrecondition, "A resize waits; confirm or revert it first."),
    ErrorCode("instance_has_snapshots", errors.FailedPrecondition, "Snapshots are inside the disks that would go."),
    ErrorCode("delete_not_due", errors.FailedPrecondition, "The instance is not soft-deleted, or can be restored yet."),
    ErrorCode("host_disabled", errors.FailedPrecondition, "The host takes no new instances; see `host.set-enabled`."),
    ErrorCode("too_late_to_cancel", errors.FailedPrecondition, "The operation is past its point of no return."),
    ErrorCode("foreign_domain", errors.FailedPrecondition, "The domain was not made by this agent and is left alone."),
    ErrorCode("disk_missing", errors.FailedPrecondition, "The instance's root disk is not there."),
    ErrorCode("disk_in_use", errors.FailedPrecondition, "Another process holds the lock of the disk."),
    ErrorCode("network_missing", errors.FailedPrecondition, "The libvirt network of a NIC does not exist."),
    ErrorCode("bridge_missing", errors.FailedPrecondition, "The bridge of a NIC does not exist on the host."),
    ErrorCode("file_missing", errors.FailedPrecondition, "A file that the hypervisor needs does not exist."),
    ErrorCode("file_access_denied", errors.FailedPrecondition, "The hypervisor may not open a file that it needs."),
    ErrorCode("resource_busy", errors.FailedPrecondition, "The hypervisor says that something the work needs is busy."),
    ErrorCode("operation_aborted", errors.FailedPrecondition, "The hypervisor's work was aborted from outside."),
    ErrorCode("hypervisor_access_denied", errors.FailedPrecondition, "The agent lacks rights at the hypervisor."),
    ErrorCode("hypervisor_login_failed", errors.Unavailable, "The hypervisor did not take the agent's login."),
    ErrorCode("failed_precondition", errors.FailedPrecondition, "The verb is impossible in the present state."),
    ErrorCode("kvm_missing", errors.FailedPrecondition, "The driver is set to KVM, which does not work on this host."),
    ErrorCode("unsupported", errors.Unsupported, "The driver or hypervisor cannot do it."),
    ErrorCode("verb_unsupported", errors.Unsupported, "The driver lacks this verb; heartbeats list what it has."),
    ErrorCode("config_unsupported", errors.Unsupported, "The hypervisor cannot run a domain with this definition."),
    ErrorCode("qemu_img_missing", errors.Unsupported, "qemu-img is not installed on the host."),
    ErrorCode("encryption_key_missing", errors.FailedPrecondition, "The host has no key of this name for the disk."),
    ErrorCode("encryption_key_unusable", errors.FailedPrecondition, "The key's file is unsafe, or no key is in it."),
    ErrorCode("manifest_damaged", errors.FailedPrecondition, "The list of the instance's volumes cannot be read."),
    ErrorCode("backend_missing", errors.FailedPrecondition, "The back end that holds a volume is not configured."),
    ErrorCode("program_missing", errors.Unsupported, "A program that makes the disk is not installed on the host."),
    ErrorCode("unknown_disk", errors.InvalidArgument, "The instance has no disk of this name that holds data."),
    ErrorCode("unknown_snapshot", errors.NotFound, "The instance has no snapshot of this name."),
    ErrorCode("snapshot_exists", errors.AlreadyExists, "The instance has a snapshot of this name already."),
    ErrorCode("snapshot_differs", errors.FailedPrecondition, "The instance was changed since; details says how."),
    ErrorCode("snapshot_limit", errors.FailedPrecondition, "The instance has as many snapshots as the host allows."),
    ErrorCode("snapshot_unsupported", errors.Unsupported, "An instance of this kind can have no snapshots."),
    ErrorCode("export_unsupported", errors.Unsupported, "A disk of this kind cannot be exported."),
    ErrorCode("export_store_unknown", errors.InvalidArgument, "The host has no export store of this name."),
    ErrorCode("export_target_forbidden", errors.InvalidArgument, "The host's policy does not allow this target."),
    ErrorCode("export_exists", errors.AlreadyExists, "The store has a file of this name already."),
    ErrorCode("export_refused", errors.FailedPrecondition, "The server does not take the upload."),
    ErrorCode("export_unavailable", errors.Unavailable, "The target cannot be reached or failed; try again."),
    # Images.
    ErrorCode("image_rejected", errors.ImageRejected, "The image is not what the command said, or is not safe."),
    ErrorCode("image_missing", errors.ImageRejected, "There is no image at this URL."),
    ErrorCode("image_source_forbidden", errors.ImageRejected, "The host's policy does not allow this source."),
    ErrorCode("image_source_denied", errors.ImageRejected, "The source refuses to give the image to the agent."),
    ErrorCode("image_checksum_mismatch", errors.ImageRejected, "The bytes do not have the sha256 of the command."),
    ErrorCode("image_format_mismatch", errors.ImageRejected, "The bytes do not have the format of the command."),
    ErrorCode("image_too_large", errors.ImageRejected, "The image is larger than the host or the command allows."),
    ErrorCode("image_corrupt", errors.ImageRejected, "The image's structure is damaged."),
    ErrorCode("image_unsafe", errors.ImageRejected, "The image refers to other files, or is otherwise unsafe."),
    ErrorCode("disk_too_small", errors.InvalidArgument, "A disk is smaller than its image."),
    ErrorCode("image_truncated", errors.Unavailable, "The source ended the image early."),
    ErrorCode("image_stalled", errors.Unavailable, "The source sent nothing for too long."),
    ErrorCode("image_unavailable", errors.Unavailable, "The source cannot be reached or answers with an error."),
    ErrorCode("image_timeout", errors.DeadlineExceeded, "The download took longer than the host allows."),
    ErrorCode("image_cache_unavailable", errors.Unavailable, "The host's image cache cannot be read or written."),
    # What is short, away or slow.
    ErrorCode("does_not_fit", errors.ResourceExhausted, "The instance does not fit; details says what is short."),
    ErrorCode("capacity_unknown", errors.Unavailable, "The host's capacity has not been read yet."),
    ErrorCode("no_space", errors.ResourceExhausted, "No disk space is left on the host."),
    ErrorCode("host_memory", errors.ResourceExhausted, "The host could not give the guest its memory."),
    ErrorCode("resource_exhausted", errors.ResourceExhausted, "Something is short on the host."),
    ErrorCode("hypervisor_unreachable", errors.Unavailable, "The hypervisor cannot be asked now."),
    ErrorCode("hypervisor_timeout", errors.DeadlineExceeded, "The hypervisor gave up waiting for itself or the guest."),
    ErrorCode("guest_agent_unresponsive", errors.Unavailable, "The guest agent does not answer."),
    ErrorCode("qemu_does_not_end", errors.Unavailable, "The guest's QEMU process could not be ended yet."),
    ErrorCode("qemu_img_timeout", errors.DeadlineExceeded, "qemu-img did not end in time."),
    ErrorCode("program_timeout", errors.DeadlineExceeded, "A program that works on a disk did not end in time."),
    ErrorCode("storage_unavailable", errors.Unavailable, "The file system of the instances failed."),
    ErrorCode("driver_threads_stuck", errors.Unavailable, "Too many hypervisor calls hang; no more are begun."),
    ErrorCode("journal_error", errors.Unavailable, "The journal could not be read."),
    ErrorCode("shutting_down", errors.Unavailable, "The agent is stopping."),
    ErrorCode("unavailable", errors.Unavailable, "A service that the work needs cannot be reached now."),
    ErrorCode("deadline_exceeded", errors.DeadlineExceeded, "A call did not end in time; read the state first."),
    # Defects and endings that need a person.
    ErrorCode("interrupted", errors.Internal, "The operation failed and its undoing outlived a restart of the agent."),
    ErrorCode("too_many_attempts", errors.Internal, "The agent died in this operation again and again; it was undone."),
    ErrorCode("hypervisor_error", errors.Internal, "The hypervisor answered with an error the agent does not know."),
    ErrorCode("hypervisor_operation_failed", errors.Internal, "The hypervisor tried and failed."),
    ErrorCode("qemu_img_failed", errors.Internal, "qemu-img failed."),
    ErrorCode("program_failed", errors.Internal, "A program that works on a disk failed."),
    ErrorCode("storage_failed", errors.Internal, "An unexpected error of the file system."),
    ErrorCode("journal_rejected", errors.Internal, "The journal can never take this change: a defect of the agent."),
    ErrorCode("internal", errors.Internal, "A defect of the agent; its log says more."),
)
"""Every code that the `error` of a final event can have. Codes are never renamed; new ones may come."""
