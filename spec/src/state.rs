//! What there is: pages, VMs, and what each side's books say of a page.
//!
//! The books have two sides, as in `docs/memory-ownership.md`: the host's entry of a page of RAM, and a guest's
//! entry of a guest page. That the two agree is not built in; it is an invariant (I2).

use abi::HostState;
use abi::page::{OwnerKind, Permissions};

/// vCPUs of each VM that can have an unshare pending.
pub const VCPUS: usize = 2;

/// Consecutive pages, of RAM or of a guest, by their numbers in the world. As a call has them: they may be
/// absurd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First page.
    pub first: u64,
    /// Number of pages.
    pub count: u64,
}

impl Run {
    /// One page.
    pub const fn one(first: u64) -> Self {
        Self { first, count: 1 }
    }

    /// The pages, as indices. For runs that have been checked.
    pub const fn indices(self) -> core::ops::Range<usize> {
        self.first as usize..(self.first + self.count) as usize
    }

    /// Whether a page is one of these.
    pub const fn contains(self, page: u64) -> bool {
        self.first <= page && page - self.first < self.count
    }
}

/// What the host's table says of a page of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostEntry {
    /// The host's alone.
    Owned,
    /// The host's, and lent to the hypervisor.
    LentToHyp,
    /// The host's, and lent to so many guest pages of VMs that are not protected. The guests' entries say which.
    LentToGuests(u8),
    /// A guest's, and shared with the host. Its guest's entry says which.
    Borrowed,
    /// The hypervisor's.
    Hyp(Use),
    /// A guest's alone, who sees it at `gfn`.
    Guest {
        /// Number of the VM.
        vm: u8,
        /// Number of the guest page.
        gfn: u16,
    },
}

/// What the hypervisor uses a page for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Use {
    /// Its own tables or records: it does not come back.
    Pool,
    /// The tables of this VM: it comes back at the end of the VM.
    Vm(u8),
}

/// What is in a page, as far as I4 cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Content {
    /// Zeros, down to memory.
    Zeros,
    /// Something that the host may know.
    Known,
    /// Something that the host must never read: of a guest's private page, or of the hypervisor.
    Secret,
}

/// A page of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Page {
    /// The host's side.
    pub host: HostEntry,
    /// The hypervisor's holds.
    pub pins: u32,
    /// What is in it.
    pub content: Content,
    /// A program of the host has it mapped, through a guest_memfd.
    pub mapped: bool,
    /// The host's kernel holds on to it, as for I/O: no unmapping ends that.
    pub held: bool,
}

impl Page {
    /// What the host may do with it: the answer of QUERY_PAGE.
    pub const fn host_state(&self) -> HostState {
        match self.host {
            HostEntry::Owned => HostState::Owned,
            HostEntry::LentToHyp | HostEntry::LentToGuests(_) => HostState::SharedOwned,
            HostEntry::Borrowed => HostState::SharedBorrowed,
            HostEntry::Hyp(_) | HostEntry::Guest { .. } => HostState::NoPage,
        }
    }

    /// Whose it is.
    pub const fn owner(&self) -> OwnerKind {
        match self.host {
            HostEntry::Owned | HostEntry::LentToHyp | HostEntry::LentToGuests(_) => OwnerKind::Host,
            HostEntry::Borrowed | HostEntry::Guest { .. } => OwnerKind::Guest,
            HostEntry::Hyp(_) => OwnerKind::Hyp,
        }
    }

    /// Whether EL2 maps it.
    pub const fn mapped_at_el2(&self) -> bool {
        matches!(self.host, HostEntry::Hyp(_)) || self.pins > 0
    }
}

/// What a guest's table says of a guest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestEntry {
    /// Nothing.
    Empty,
    /// Enrolled as a device.
    Device,
    /// Memory was there, and was taken by force.
    Poisoned,
    /// Memory.
    Page {
        /// Number of the page of RAM.
        pfn: u16,
        /// Whose it is.
        sharing: Sharing,
    },
}

/// How a guest has a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// It is the guest's alone.
    Owned,
    /// It is the guest's, and shared with the host.
    Shared,
    /// It is the host's, which lends it.
    Borrowed(Permissions),
}

/// Where a VM is in its life. Each VM has a number of its own that is never used again (I9), so a handle is just
/// that number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Not made yet: no handle names it.
    Unborn,
    /// Alive.
    Live,
    /// Its teardown has begun: nothing of it runs, its pages go back.
    Dying,
    /// Gone for ever.
    Gone,
}

/// A VM of `G` guest pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vm<const G: usize> {
    /// Where in its life.
    pub phase: Phase,
    /// Its memory is taken from the host.
    pub protected: bool,
    /// MEM_UNSHARE asks nobody.
    pub immediate: bool,
    /// What its table says.
    pub entries: [GuestEntry; G],
    /// Pages that name it: those that it owns or borrows.
    pub pages: u16,
    /// The unshare that each vCPU waits for.
    pub pending: [Option<Run>; VCPUS],
}

/// Everything: `P` pages of RAM, all that may change hands, and `V` VMs of `G` guest pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State<const P: usize, const V: usize, const G: usize> {
    /// RAM.
    pub pages: [Page; P],
    /// VMs, in the order of their creation.
    pub vms: [Vm<G>; V],
}

impl<const P: usize, const V: usize, const G: usize> State<P, V, G> {
    /// Boot: everything is the host's.
    pub const fn new() -> Self {
        let page =
            Page { host: HostEntry::Owned, pins: 0, content: Content::Zeros, mapped: false, held: false };
        let vm = Vm {
            phase: Phase::Unborn,
            protected: false,
            immediate: false,
            entries: [GuestEntry::Empty; G],
            pages: 0,
            pending: [None; VCPUS],
        };
        Self { pages: [page; P], vms: [vm; V] }
    }

    /// Whether an unshare of this page is pending: the host lets nobody near it until that is settled.
    pub fn is_draining(&self, pfn: usize) -> bool {
        self.vms.iter().any(|vm| {
            vm.pending.iter().flatten().flat_map(|run| run.indices()).any(
                |gfn| matches!(vm.entries[gfn], GuestEntry::Page { pfn: at, .. } if usize::from(at) == pfn),
            )
        })
    }
}

impl<const P: usize, const V: usize, const G: usize> Default for State<P, V, G> {
    fn default() -> Self {
        Self::new()
    }
}
