//! Where somebody who watches transitions is hooked in: what was asked, what was held, what was answered.
//!
//! In a build with the feature `oracle` that is [`crate::oracle`]; in any other nobody watches, and of the hook
//! nothing is left. It is called with the locks of the transition held, before and after it, and changes nothing.

#![forbid(unsafe_code)]

use crate::addr::{Gfn, Pages, Pfn};
use crate::ownership::{Error, Host, HypSpace};
use crate::vm::Vm;
use abi::page::{Permissions, Pool};
use abi::{HostState, VmFlags, VmHandle};

#[cfg(all(feature = "oracle", not(deed_shuttle)))]
pub(crate) use crate::oracle::Watch;

/// A transition that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// POOL_TOPUP.
    PoolTopUp(Pool, Pages<Pfn>),
    /// VM_TOPUP.
    VmTopUp(VmHandle, Pages<Pfn>),
    /// SHARE_HYP.
    ShareHyp(Pages<Pfn>),
    /// UNSHARE_HYP.
    UnshareHyp(Pages<Pfn>),
    /// A pin.
    Pin(Pfn),
    /// Its end.
    Unpin(Pfn),
    /// DONATE_GUEST.
    DonateGuest(VmHandle, Pages<Pfn>, Pages<Gfn>),
    /// SHARE_GUEST.
    ShareGuest(VmHandle, Pages<Pfn>, Pages<Gfn>, Permissions),
    /// UNSHARE_GUEST.
    UnshareGuest(VmHandle, Pages<Gfn>),
    /// RECLAIM_GUEST.
    ReclaimGuest(VmHandle, Pages<Gfn>),
    /// FORCE_RECLAIM, and the guest pages that the host's table names, if it names any.
    ForceReclaim(Pages<Pfn>, Option<(VmHandle, Pages<Gfn>)>),
    /// MEM_SHARE.
    Share(VmHandle, Pages<Gfn>),
    /// MEM_UNSHARE, when nobody has to be asked any more.
    Unshare(VmHandle, Pages<Gfn>),
    /// MEM_UNSHARE of a VM whose host is asked first.
    MayUnshare(VmHandle, Pages<Gfn>),
    /// MEM_RELINQUISH.
    Relinquish(VmHandle, Pages<Gfn>),
    /// MMIO_GUARD_MAP.
    GuardMap(VmHandle, Pages<Gfn>),
    /// MMIO_GUARD_UNMAP.
    GuardUnmap(VmHandle, Pages<Gfn>),
    /// QUERY_PAGE.
    QueryPage(Pfn),
    /// VM_CREATE, as far as the root is concerned.
    TakeRoot(VmFlags, Pages<Pfn>),
    /// VM_TEARDOWN_START.
    TeardownStart(VmHandle),
    /// VM_TEARDOWN_FINISH, before the first page goes back.
    TeardownFinish(VmHandle),
    /// VM_TEARDOWN_FINISH, for pages that the host had given to the VM and gets back in one step.
    GiveBack(VmHandle, Pages<Pfn>),
}

/// The components whose locks are held.
#[cfg_attr(any(not(feature = "oracle"), deed_shuttle), expect(dead_code, reason = "nobody watches"))]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held<'a> {
    pub(crate) host: Option<&'a Host>,
    pub(crate) hyp: Option<&'a HypSpace>,
    /// Of the VM that the call names, if there is such a VM.
    pub(crate) vm: Option<&'a Vm>,
}

impl<'a> Held<'a> {
    /// Host and hypervisor.
    pub(crate) fn host_and_hyp(host: &'a Host, hyp: &'a HypSpace) -> Self {
        Self { host: Some(host), hyp: Some(hyp), vm: None }
    }

    /// The VM alone.
    pub(crate) fn only_vm(vm: Option<&'a Vm>) -> Self {
        Self { host: None, hyp: None, vm }
    }
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It is done, for so many pages.
    Done(u64),
    /// It is refused by a transition.
    Refused(Error),
    /// It is refused by the VM.
    Denied(abi::Error),
    /// The host is asked to let go of so many pages.
    Asks(u64),
    /// It is not: not all of them are shared.
    NotShared,
    /// What the host may do with a page, and whether it is memory.
    Page(HostState, bool),
}

impl Answer {
    /// The answer of a VM to a call that is done or not.
    pub(crate) fn from_vm(result: Result<(), abi::Error>) -> Self {
        match result {
            Ok(()) => Self::Done(0),
            Err(error) => Self::Denied(error),
        }
    }
}

impl From<&Result<u64, Error>> for Answer {
    fn from(result: &Result<u64, Error>) -> Self {
        match result {
            Ok(done) => Self::Done(*done),
            Err(error) => Self::Refused(*error),
        }
    }
}

/// Nobody who watches.
#[cfg(any(not(feature = "oracle"), deed_shuttle))]
pub(crate) struct Watch;

#[cfg(any(not(feature = "oracle"), deed_shuttle))]
impl Watch {
    /// Looks at what there is before a transition.
    #[inline(always)]
    pub(crate) fn begin<M>(_hypervisor: &crate::Hypervisor<M>, _asked: Asked, _held: Held<'_>) -> Self {
        Self
    }

    /// Looks at what there is after it.
    #[inline(always)]
    pub(crate) fn end<M>(self, _hypervisor: &crate::Hypervisor<M>, _held: Held<'_>, _answer: Answer) {}
}
