//! What can be asked, and what can be answered.

use crate::state::Run;
use abi::page::{Permissions, Pool};
use abi::{Error, HostState};

/// Something that somebody does. Numbers of pages and VMs are those of the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the calls in docs/hypercalls.md")]
pub enum Call {
    /// Host: POOL_TOPUP.
    PoolTopUp { pool: Pool, pfns: Run },
    /// Host: VM_TOPUP.
    VmTopUp { vm: u8, pfns: Run },
    /// Host: SHARE_HYP.
    ShareHyp { pfns: Run },
    /// Host: UNSHARE_HYP.
    UnshareHyp { pfns: Run },
    /// Host: DONATE_GUEST.
    DonateGuest { vm: u8, pfn: u64, gfn: u64, count: u64 },
    /// Host: SHARE_GUEST.
    ShareGuest { vm: u8, pfn: u64, gfn: u64, count: u64, permissions: Permissions },
    /// Host: UNSHARE_GUEST.
    UnshareGuest { vm: u8, gfns: Run },
    /// Host: RECLAIM_GUEST.
    ReclaimGuest { vm: u8, gfns: Run },
    /// Host: FORCE_RECLAIM.
    ForceReclaim { pfns: Run },
    /// Host: QUERY_PAGE.
    QueryPage { pfn: u64 },
    /// Host: VM_CREATE. The VM is the first that is not born.
    VmCreate { protected: bool, immediate: bool, root: u64 },
    /// Host: UNSHARE_ACK.
    UnshareAck { vm: u8, vcpu: u8 },
    /// Host: VM_TEARDOWN_START.
    VmTeardownStart { vm: u8 },
    /// Host: VM_TEARDOWN_FINISH, until nothing is left.
    VmTeardownFinish { vm: u8 },
    /// Hypervisor: holds on to a page that is shared with it.
    Pin { pfn: u64 },
    /// Hypervisor: lets go of it.
    Unpin { pfn: u64 },
    /// Guest: MEM_SHARE.
    Share { vm: u8, gfns: Run },
    /// Guest: MEM_UNSHARE, by one of its vCPUs.
    Unshare { vm: u8, vcpu: u8, gfns: Run },
    /// Guest: MEM_RELINQUISH.
    Relinquish { vm: u8, gfns: Run },
    /// Guest: MMIO_GUARD_MAP.
    GuardMap { vm: u8, gfns: Run },
    /// Guest: MMIO_GUARD_UNMAP.
    GuardUnmap { vm: u8, gfns: Run },
    /// Guest: a store.
    GuestStore { vm: u8, gfn: u64 },
    /// Host: a store.
    HostStore { pfn: u64 },
    /// Host: maps a page of a guest_memfd for a program.
    Map { pfn: u64 },
    /// Host: unmaps it everywhere.
    Unmap { pfn: u64 },
    /// Host: holds on to a page of a guest_memfd.
    Hold { pfn: u64 },
    /// Host: lets go of it.
    Release { pfn: u64 },
}

/// Names of the calls, in their order.
pub const CALLS: [&str; 27] = [
    "POOL_TOPUP",
    "VM_TOPUP",
    "SHARE_HYP",
    "UNSHARE_HYP",
    "DONATE_GUEST",
    "SHARE_GUEST",
    "UNSHARE_GUEST",
    "RECLAIM_GUEST",
    "FORCE_RECLAIM",
    "QUERY_PAGE",
    "VM_CREATE",
    "UNSHARE_ACK",
    "VM_TEARDOWN_START",
    "VM_TEARDOWN_FINISH",
    "pin",
    "unpin",
    "MEM_SHARE",
    "MEM_UNSHARE",
    "MEM_RELINQUISH",
    "MMIO_GUARD_MAP",
    "MMIO_GUARD_UNMAP",
    "guest's store",
    "host's store",
    "host maps",
    "host unmaps",
    "host holds",
    "host releases",
];

impl Call {
    /// Which of [`CALLS`] it is.
    pub const fn kind(&self) -> usize {
        match self {
            Self::PoolTopUp { .. } => 0,
            Self::VmTopUp { .. } => 1,
            Self::ShareHyp { .. } => 2,
            Self::UnshareHyp { .. } => 3,
            Self::DonateGuest { .. } => 4,
            Self::ShareGuest { .. } => 5,
            Self::UnshareGuest { .. } => 6,
            Self::ReclaimGuest { .. } => 7,
            Self::ForceReclaim { .. } => 8,
            Self::QueryPage { .. } => 9,
            Self::VmCreate { .. } => 10,
            Self::UnshareAck { .. } => 11,
            Self::VmTeardownStart { .. } => 12,
            Self::VmTeardownFinish { .. } => 13,
            Self::Pin { .. } => 14,
            Self::Unpin { .. } => 15,
            Self::Share { .. } => 16,
            Self::Unshare { .. } => 17,
            Self::Relinquish { .. } => 18,
            Self::GuardMap { .. } => 19,
            Self::GuardUnmap { .. } => 20,
            Self::GuestStore { .. } => 21,
            Self::HostStore { .. } => 22,
            Self::Map { .. } => 23,
            Self::Unmap { .. } => 24,
            Self::Hold { .. } => 25,
            Self::Release { .. } => 26,
        }
    }

    /// The VM that it is about, or that makes it.
    pub const fn vm(&self) -> Option<u8> {
        match *self {
            Self::VmTopUp { vm, .. }
            | Self::DonateGuest { vm, .. }
            | Self::ShareGuest { vm, .. }
            | Self::UnshareGuest { vm, .. }
            | Self::ReclaimGuest { vm, .. }
            | Self::UnshareAck { vm, .. }
            | Self::VmTeardownStart { vm }
            | Self::VmTeardownFinish { vm }
            | Self::Share { vm, .. }
            | Self::Unshare { vm, .. }
            | Self::Relinquish { vm, .. }
            | Self::GuardMap { vm, .. }
            | Self::GuardUnmap { vm, .. }
            | Self::GuestStore { vm, .. } => Some(vm),
            _ => None,
        }
    }
}

/// What comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done, for so many pages.
    Done(u64),
    /// This VM was made.
    Created(u8),
    /// So many pages came back, and the VM is gone.
    Ended(u64),
    /// What the host may do with the page, and whether it is RAM that may change hands.
    Page(HostState, bool),
    /// The host is asked to let go of so many pages first.
    Asked(u64),
    /// The vCPU exits to the host, since nothing is at this guest page; the call is made again afterwards.
    Missing(u64),
    /// The access is a device's, at this guest page: the host is shown it, with its data.
    Device(u64),
    /// The host's call is refused.
    Refused(Error),
    /// So is the guest's.
    InvalidParameter,
    /// The call lacks pages of this pool. Of a guest: an exit, after which it is made again.
    Lacking(Pool),
    /// The guest has no such call, or the vCPU does not run.
    NotServed,
    /// The access is not allowed: an external abort, SIGBUS for a program.
    Aborted,
}

/// Names of the outcomes, in the order of [`Outcome::kind`].
pub const OUTCOMES: [&str; 23] = [
    "done",
    "VM made",
    "VM gone",
    "NoPage",
    "Owned",
    "SharedOwned",
    "SharedBorrowed",
    "asks the host",
    "MissingPage",
    "Permission",
    "NoEntry",
    "Again",
    "Busy",
    "Exists",
    "Invalid",
    "Range",
    "INVALID_PARAMETER",
    "NoMemory: tables",
    "NoMemory: metadata",
    "NoMemory: VM",
    "not served",
    "abort",
    "Mmio",
];

impl Outcome {
    /// Which of [`OUTCOMES`] it is.
    pub const fn kind(&self) -> usize {
        match self {
            Self::Done(_) => 0,
            Self::Created(_) => 1,
            Self::Ended(_) => 2,
            Self::Page(state, _) => 3 + *state as usize,
            Self::Asked(_) => 7,
            Self::Missing(_) => 8,
            Self::Refused(error) => match error {
                Error::NoEntry => 10,
                Error::Again => 11,
                Error::Busy => 12,
                Error::Exists => 13,
                Error::Invalid => 14,
                Error::Range => 15,
                Error::Permission | Error::NoMemory | Error::Poisoned => 9,
            },
            Self::InvalidParameter => 16,
            Self::Lacking(pool) => 17 + *pool as usize,
            Self::NotServed => 20,
            Self::Aborted => 21,
            Self::Device(_) => 22,
        }
    }

    /// Whether nothing may have changed (I5).
    pub const fn is_refusal(&self) -> bool {
        !matches!(self, Self::Done(_) | Self::Created(_) | Self::Ended(_) | Self::Asked(_))
    }
}
