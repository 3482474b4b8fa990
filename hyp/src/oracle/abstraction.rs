//! What the real tables say of a page, in the specification's words. Only tables whose locks are held are read.

use super::window::Window;
use crate::Hypervisor;
use crate::addr::{Gfn, Pfn};
use crate::machine::Machine;
use crate::ownership::{Host, HypSpace};
use crate::pgtable::hyp_stage1::{Mapped, Rights};
use crate::pgtable::stage2::{Entry, Owner, Sharing as Leaf};
use crate::vm::{Phase as VmPhase, Vm};
use crate::watch::Held;
use abi::page::Permissions;
use spec::state::{Content, GuestEntry, HostEntry, Page, Phase, Sharing, Use};

/// An entry of the host's table that stands for nothing in the rules: a device that is withheld, a
/// break-before-make that was never ended, a page at the wrong address or with rights that none has.
pub(super) const ODD: HostEntry = HostEntry::Hyp(Use::Vm(u8::MAX));

/// A page, as far as what is held tells.
pub(super) fn page<M: Machine>(
    hypervisor: &Hypervisor<M>,
    held: Held<'_>,
    window: &Window,
    pfn: Pfn,
) -> Page {
    let host = held.host.map_or(HostEntry::Owned, |host| host_entry(hypervisor, host, window, pfn));
    let pins = held.hyp.map_or(0, |hyp| hyp.pins.count(pfn));
    let page = Page { host, pins, content: Content::Known, mapped: false, held: false };
    let content = if page.host_state().is_accessible() { Content::Known } else { Content::Secret };
    Page { content, ..page }
}

fn host_entry<M: Machine>(hypervisor: &Hypervisor<M>, host: &Host, window: &Window, pfn: Pfn) -> HostEntry {
    // What is no RAM is a device to the host, and no code.
    let rights = Permissions { write: true, execute: hypervisor.ram.contains(pfn) };
    match host.table.entry(&hypervisor.machine, pfn.identity()) {
        Some(Entry::Page(page)) if page.pfn != pfn || page.permissions != rights => ODD,
        Some(Entry::Page(page)) => match page.sharing {
            Leaf::Owned => HostEntry::Owned,
            Leaf::Lent(borrowers) => HostEntry::LentToGuests(borrowers.get()),
            Leaf::Shared => ODD,
            Leaf::Borrowed => HostEntry::Borrowed,
            Leaf::SharedWithHyp => HostEntry::LentToHyp,
        },
        Some(Entry::Owned(Owner::Hyp)) => HostEntry::Hyp(Use::Pool),
        Some(Entry::Owned(Owner::Guest { vm, gfn })) => match window.guest_index(gfn) {
            Some(number) if window.vm == Some(vm) => HostEntry::Guest { vm: 0, gfn: number as u16 },
            // A guest page that the window does not show. The low bits are enough to see whether it changes.
            _ => HostEntry::Guest { vm: vm.slot().saturating_add(1), gfn: gfn.as_u64() as u16 },
        },
        _ => ODD,
    }
}

/// Whether EL2 maps a page, read-write and at its own address.
pub(super) fn is_mapped<M: Machine>(machine: &M, hyp: &HypSpace, page: Pfn) -> bool {
    let mapped = hyp.table.entry(machine, page.identity_va()).flatten();
    matches!(mapped, Some(Mapped { pfn, rights: Rights::ReadWrite }) if pfn == page)
}

/// The page that a guest has at one of its pages.
pub(super) fn guest_pfn<M: Machine>(machine: &M, vm: &Vm, gfn: Option<Gfn>) -> Option<u64> {
    match vm.space.table.entry(machine, gfn?) {
        Some(Entry::Page(page)) => Some(page.pfn.as_u64()),
        _ => None,
    }
}

/// What a guest has at one of its pages; `None` if the entry stands for nothing in the rules.
pub(super) fn guest_entry<M: Machine>(
    machine: &M,
    vm: &Vm,
    window: &Window,
    gfn: Option<Gfn>,
) -> Option<GuestEntry> {
    let Some(entry) = gfn.and_then(|gfn| vm.space.table.entry(machine, gfn)) else {
        // Beyond the guest's address space there is nothing.
        return Some(GuestEntry::Empty);
    };
    let page = match entry {
        Entry::Empty => return Some(GuestEntry::Empty),
        Entry::Device => return Some(GuestEntry::Device),
        Entry::Poisoned => return Some(GuestEntry::Poisoned),
        Entry::Page(page) => page,
        Entry::Owned(_) | Entry::Withheld | Entry::Locked => return None,
    };
    let sharing = match page.sharing {
        Leaf::Borrowed => Sharing::Borrowed(page.permissions),
        Leaf::Owned if page.permissions == Permissions::ALL => Sharing::Owned,
        Leaf::Shared if page.permissions == Permissions::ALL => Sharing::Shared,
        _ => return None,
    };
    Some(GuestEntry::Page { pfn: window.index_of(page.pfn.as_u64()) as u16, sharing })
}

/// What the host's side says of a page that its VM has so, at this guest page of the window.
pub(super) fn agreeing(sharing: Sharing, gfn: usize) -> HostEntry {
    match sharing {
        Sharing::Owned => HostEntry::Guest { vm: 0, gfn: gfn as u16 },
        Sharing::Shared => HostEntry::Borrowed,
        Sharing::Borrowed(_) => HostEntry::LentToGuests(1),
    }
}

/// Where a VM is in its life.
pub(super) fn phase(vm: Option<&Vm>) -> Phase {
    match vm.map(|vm| vm.phase) {
        None => Phase::Unborn,
        Some(VmPhase::Live) => Phase::Live,
        Some(VmPhase::Dying) => Phase::Dying,
    }
}
