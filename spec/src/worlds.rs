//! The worlds that `cargo xtask model` explores.
//!
//! | world | pages, VMs, guest pages | tried |
//! |---|---|---|
//! | `hostile` | 6, 2, 2 | every call, also absurd ones, by a host that does as it likes |
//! | `honest` | 4, 1, 2 | the same by a host with a guest_memfd that means well: what it has mapped is never dead |
//! | `runs` | 6, 1, 3 | runs of all lengths, over the end of a 2 MiB region, of RAM and of the guest |
//!
//! Stores are tried, but not in `runs`, so what is in a page is part of a state. A page is pinned twice at the most.

use crate::call::{CALLS, Call, OUTCOMES};
use crate::explore::{Game, Pairs, Report};
use crate::state::{Run, VCPUS};
use crate::step::{World, step};
use abi::page::{Permissions, Pool};

/// What the worlds together reached of the outcomes that are listed: none is missing, and there is no other.
/// Returns what differs, in words.
pub fn differences(pairs: &Pairs) -> Vec<String> {
    let mut differences = Vec::new();
    for (call, (row, listed)) in pairs.iter().zip(LISTED).enumerate() {
        for (count, outcome) in row.iter().zip(OUTCOMES) {
            match (*count > 0, listed.contains(&outcome)) {
                (true, false) => differences.push(format!("{}: {outcome} is not listed", CALLS[call])),
                (false, true) => differences.push(format!("{}: {outcome} is never reached", CALLS[call])),
                _ => {}
            }
        }
    }
    differences
}

/// The outcomes that each call has in these worlds, in the order of [`CALLS`]: a change of the rules that adds or
/// loses one is noticed. Those that take running vCPUs (`Busy` of a claimed one, `Again`) are not part of the rules.
/// `tests/tests/documents.rs` holds them against the errors that the interface documents.
pub const LISTED: [&[&str]; CALLS.len()] = [
    // POOL_TOPUP
    &["done", "Permission", "Invalid", "NoMemory: tables"],
    // VM_TOPUP
    &["done", "Permission", "NoEntry", "Invalid", "NoMemory: tables"],
    // SHARE_HYP
    &["done", "Permission", "Invalid", "NoMemory: tables"],
    // UNSHARE_HYP
    &["done", "Permission", "Busy", "Invalid", "NoMemory: tables"],
    // DONATE_GUEST
    &["done", "Permission", "NoEntry", "Invalid", "Range", "NoMemory: tables", "NoMemory: VM"],
    // SHARE_GUEST
    &["done", "Permission", "NoEntry", "Invalid", "Range", "NoMemory: tables", "NoMemory: VM"],
    // UNSHARE_GUEST
    &["done", "Permission", "NoEntry", "Invalid", "Range", "NoMemory: tables", "NoMemory: VM"],
    // RECLAIM_GUEST
    &["done", "Permission", "NoEntry", "Invalid", "Range", "NoMemory: tables", "NoMemory: VM"],
    // FORCE_RECLAIM
    &["done", "Permission", "Again", "Invalid", "NoMemory: tables", "NoMemory: VM"],
    // QUERY_PAGE
    &["NoPage", "Owned", "SharedOwned", "SharedBorrowed", "Invalid"],
    // VM_CREATE
    &["VM made", "Permission", "Busy", "Invalid", "NoMemory: tables", "NoMemory: metadata"],
    // UNSHARE_ACK
    &["done", "Permission", "NoEntry", "NoMemory: tables", "NoMemory: VM"],
    // VM_TEARDOWN_START
    &["done", "Permission", "NoEntry"],
    // VM_TEARDOWN_FINISH
    &["VM gone", "Permission", "NoEntry", "Busy", "NoMemory: tables"],
    // pin
    &["done", "Permission", "Busy", "NoMemory: tables"],
    // unpin
    &["done", "Permission"],
    // MEM_SHARE
    &["done", "MissingPage", "INVALID_PARAMETER", "NoMemory: tables", "NoMemory: VM", "not served"],
    // MEM_UNSHARE
    &["done", "asks the host", "INVALID_PARAMETER", "NoMemory: tables", "NoMemory: VM", "not served"],
    // MEM_RELINQUISH
    &["done", "INVALID_PARAMETER", "NoMemory: tables", "NoMemory: VM", "not served"],
    // MMIO_GUARD_MAP
    &["done", "INVALID_PARAMETER", "NoMemory: VM", "not served"],
    // MMIO_GUARD_UNMAP
    &["done", "INVALID_PARAMETER", "NoMemory: VM", "not served"],
    // guest's store
    &["done", "MissingPage", "not served", "abort", "Mmio"],
    // host's store
    &["done", "abort"],
    // host maps
    &["done", "abort"],
    // host unmaps
    &["done"],
    // host holds
    &["done", "abort"],
    // host releases
    &["done"],
];

/// Names of the worlds.
pub const WORLDS: [&str; 3] = ["hostile", "honest", "runs"];

/// Explores a world by its name; `None` if there is none.
pub fn explore(name: &str) -> Option<Report> {
    Some(match name {
        "hostile" => hostile().explore(),
        "honest" => honest().explore(),
        "runs" => runs().explore(),
        _ => return None,
    })
}

/// A world of so many pages and guest pages, in the middle of a region.
const fn middle(pages: u64, gfns: u64) -> World {
    World { pfn: 0x40_0100, pages, gfn: 0x100, gfns, pins: 2 }
}

/// A host that does as it likes.
pub fn hostile() -> Game<6, 2, 2> {
    let mut calls = Vec::new();
    for pfn in 0..6 {
        single(&mut calls, pfn);
        calls.push(Call::PoolTopUp { pool: Pool::Tables, pfns: Run::one(pfn) });
        for vm in 0..2 {
            give(&mut calls, vm, pfn, 2);
        }
    }
    for root in [0, 2, 4] {
        create(&mut calls, root, true);
        let pfns = Run { first: root, count: 2 };
        calls.extend([Call::ShareHyp { pfns }, Call::UnshareHyp { pfns }]);
    }
    for vm in 0..2 {
        of_vm(&mut calls, vm, 2);
    }
    absurd(&mut calls, 6, 2);
    Game { world: middle(6, 2), calls, honest: false, merged: true, rules: step }
}

/// A host that means well, with programs that map pages of a guest_memfd.
pub fn honest() -> Game<4, 1, 2> {
    let mut calls = Vec::new();
    for pfn in 0..4 {
        single(&mut calls, pfn);
        give(&mut calls, 0, pfn, 2);
        calls.extend([Call::Map { pfn }, Call::Unmap { pfn }, Call::Hold { pfn }, Call::Release { pfn }]);
    }
    for root in [0, 2] {
        create(&mut calls, root, false);
    }
    of_vm(&mut calls, 0, 2);
    Game { world: middle(4, 2), calls, honest: true, merged: true, rules: step }
}

/// Runs of pages, with a region's end in the middle of RAM and of the guest. Pages have neighbours here, so none
/// stands for another, and no states are merged.
pub fn runs() -> Game<6, 1, 3> {
    let world = World { pfn: 0x40_01fc, pages: 6, gfn: 0x1ff, gfns: 3, pins: 1 };
    let mut calls = Vec::new();
    for first in 0..7 {
        for count in 0..4 {
            let pfns = Run { first, count };
            calls.extend([Call::ShareHyp { pfns }, Call::UnshareHyp { pfns }, Call::ForceReclaim { pfns }]);
            for gfn in 0..4 {
                calls.push(Call::DonateGuest { vm: 0, pfn: first, gfn, count });
                let permissions = Permissions::ALL;
                calls.push(Call::ShareGuest { vm: 0, pfn: first, gfn, count, permissions });
            }
        }
        calls.extend([Call::Pin { pfn: first }, Call::Unpin { pfn: first }]);
    }
    calls.push(Call::VmTopUp { vm: 0, pfns: Run { first: 4, count: 2 } });
    create(&mut calls, 0, true);
    of_vm(&mut calls, 0, 3);
    // What is in a page is the other worlds' business.
    calls.retain(|call| !matches!(call, Call::GuestStore { .. }));
    Game { world, calls, honest: false, merged: false, rules: step }
}

/// Calls about one page.
fn single(calls: &mut Vec<Call>, pfn: u64) {
    let pfns = Run::one(pfn);
    calls.extend([
        Call::ShareHyp { pfns },
        Call::UnshareHyp { pfns },
        Call::ForceReclaim { pfns },
        Call::Pin { pfn },
        Call::Unpin { pfn },
        Call::QueryPage { pfn },
        Call::HostStore { pfn },
    ]);
}

/// Calls that give a VM a page.
fn give(calls: &mut Vec<Call>, vm: u8, pfn: u64, gfns: u64) {
    calls.push(Call::VmTopUp { vm, pfns: Run::one(pfn) });
    for gfn in 0..gfns {
        calls.push(Call::DonateGuest { vm, pfn, gfn, count: 1 });
        for write in [false, true] {
            let permissions = Permissions { write, execute: true };
            calls.push(Call::ShareGuest { vm, pfn, gfn, count: 1, permissions });
        }
    }
}

/// VMs of each kind, at one root.
fn create(calls: &mut Vec<Call>, root: u64, with_immediate: bool) {
    calls.push(Call::VmCreate { protected: true, immediate: false, root });
    calls.push(Call::VmCreate { protected: false, immediate: false, root });
    if with_immediate {
        calls.push(Call::VmCreate { protected: true, immediate: true, root });
    }
}

/// What a VM does, and what the host does to it, in runs of all lengths.
fn of_vm(calls: &mut Vec<Call>, vm: u8, gfns: u64) {
    for first in 0..gfns {
        for count in 1..=gfns - first {
            let gfns = Run { first, count };
            calls.extend([
                Call::UnshareGuest { vm, gfns },
                Call::ReclaimGuest { vm, gfns },
                Call::Share { vm, gfns },
                Call::Relinquish { vm, gfns },
                Call::GuardMap { vm, gfns },
                Call::GuardUnmap { vm, gfns },
            ]);
            calls.extend((0..VCPUS as u8).map(|vcpu| Call::Unshare { vm, vcpu, gfns }));
        }
        calls.push(Call::GuestStore { vm, gfn: first });
    }
    calls.extend((0..VCPUS as u8).map(|vcpu| Call::UnshareAck { vm, vcpu }));
    calls.extend([Call::VmTeardownStart { vm }, Call::VmTeardownFinish { vm }]);
}

/// Calls that can never be right.
fn absurd(calls: &mut Vec<Call>, pages: u64, guest_pages: u64) {
    let runs = [
        Run { first: 0, count: 0 },
        Run { first: pages, count: 1 },
        Run { first: pages - 1, count: 2 },
        Run { first: u64::MAX, count: 1 },
        Run { first: 0, count: 1 << 52 },
        Run { first: 1, count: u64::MAX },
    ];
    for pfns in runs {
        calls.extend([Call::ShareHyp { pfns }, Call::UnshareHyp { pfns }, Call::VmTopUp { vm: 0, pfns }]);
        calls.push(Call::ForceReclaim { pfns });
        calls.push(Call::PoolTopUp { pool: Pool::Metadata, pfns });
        calls.push(Call::DonateGuest { vm: 0, pfn: pfns.first, gfn: 0, count: pfns.count });
    }
    let runs = [
        Run { first: guest_pages, count: 1 },
        Run { first: guest_pages - 1, count: 2 },
        Run { first: u64::MAX, count: 1 },
        Run { first: 0, count: u64::MAX },
    ];
    let permissions = Permissions::ALL;
    for gfns in runs {
        let (gfn, count) = (gfns.first, gfns.count);
        calls.extend([
            Call::DonateGuest { vm: 0, pfn: 0, gfn, count },
            Call::ShareGuest { vm: 0, pfn: 0, gfn, count, permissions },
            Call::UnshareGuest { vm: 0, gfns },
            Call::ReclaimGuest { vm: 0, gfns },
            Call::Share { vm: 0, gfns },
            Call::Unshare { vm: 0, vcpu: 0, gfns },
            Call::Relinquish { vm: 0, gfns },
            Call::GuardMap { vm: 0, gfns },
            Call::GuardUnmap { vm: 0, gfns },
        ]);
    }
    for pfn in [pages, u64::MAX] {
        calls.extend([Call::QueryPage { pfn }, Call::Pin { pfn }, Call::Unpin { pfn }]);
        calls.extend([
            Call::HostStore { pfn },
            Call::VmCreate { protected: true, immediate: true, root: pfn },
        ]);
    }
    calls.push(Call::VmCreate { protected: true, immediate: true, root: 1 });
    calls.push(Call::PoolTopUp { pool: Pool::Vm, pfns: Run::one(0) });
    calls.push(Call::UnshareAck { vm: 0, vcpu: VCPUS as u8 });
}
