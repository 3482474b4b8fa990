//! Operations of the host for which nobody has set a budget, and pKVM has none or counts none.

use abi::page::{Permissions, Pool};
use abi::{Error, HostCall, VmFlags, VmHandle};
use host_programs::deed::Deed;
use host_programs::play::{Entry, play};
use host_programs::raw_vm::RawVm;
use host_programs::steps::Steps;
use host_programs::{Failure, failure};

use crate::host::{ROUNDS, TABLE_PAGES, done, row};

/// First guest page: the start of a table.
const GFN: u64 = 0x8_0000;
/// Pages that pools get for good.
const GIVEN: u64 = 32;
/// VMs that are made and ended, one after the other.
const VMS: u64 = 64;
/// Pages that a root is made of, and is aligned to.
const ROOT_PAGES: u64 = abi::host::VM_ROOT_PAGES;

/// All rows.
pub(crate) fn rows(deed: &Deed, steps: &Steps) -> Result<(), Failure> {
    lend(deed, steps)?;
    force(deed, steps)?;
    top_up(deed, steps)?;
    lives(deed, steps)
}

/// A page lent to a guest that is not protected, and taken back.
fn lend(deed: &Deed, steps: &Steps) -> Result<(), Failure> {
    let pfn = deed.alloc(1)?;
    let mut vm = RawVm::new(deed, VmFlags::default())?;
    let handle = vm.handle();
    let share = HostCall::ShareGuest { vm: handle, pfn, gfn: GFN, pages: 1, permissions: Permissions::ALL };
    let back = HostCall::UnshareGuest { vm: handle, gfn: GFN, pages: 1 };
    vm.must(deed, share)?;
    deed.must(back)?;
    let mut list = [Entry::call(share), Entry::call(back)];
    play(deed, &mut list, ROUNDS)?;
    let [lent, taken] = &list;
    row(steps, "host lend to a guest, one page", lent, ROUNDS, done(1))?;
    row(steps, "host take a lent page back", taken, ROUNDS, done(1))?;
    vm.end(deed)?;
    deed.free(pfn, 1)
}

/// A private page of a living guest, taken by force: poison is left, so each round donates it at another guest page.
fn force(deed: &Deed, steps: &Steps) -> Result<(), Failure> {
    let pfn = deed.alloc(1)?;
    let mut vm = RawVm::protected(deed)?;
    let handle = vm.handle();
    let donate = |page| HostCall::DonateGuest { vm: handle, pfn, gfn: GFN + page, pages: 1 };
    let force = HostCall::ForceReclaim { pfn, pages: 1 };
    vm.must(deed, donate(0))?;
    deed.must(force)?;
    let rounds = TABLE_PAGES - 1;
    let mut list = [Entry::advancing(donate(1), donate(2)), Entry::call(force)];
    play(deed, &mut list, rounds)?;
    let [_, forced] = &list;
    row(steps, "host take a private page by force, wiped", forced, rounds, done(1))?;
    vm.end(deed)?;
    deed.free(pfn, 1)
}

/// Pages for tables: to a VM, which gives them back, and to the hypervisor, for good.
fn top_up(deed: &Deed, steps: &Steps) -> Result<(), Failure> {
    let pfn = deed.alloc(TABLE_PAGES)?;
    let vm = RawVm::protected(deed)?;
    let handle = vm.handle();
    let to_vm = |page| HostCall::VmTopUp { vm: handle, pfn: pfn + page, pages: 1 };
    let mut list = [Entry::advancing(to_vm(0), to_vm(1))];
    play(deed, &mut list, TABLE_PAGES)?;
    let [given] = &list;
    row(steps, "table page for a VM", given, TABLE_PAGES, done(1))?;
    vm.end(deed)?;
    deed.free(pfn, TABLE_PAGES)?;

    let pfn = deed.alloc(GIVEN)?;
    let to_pool = |page| HostCall::PoolTopUp { pool: Pool::Tables, pfn: pfn + page, pages: 1 };
    let mut list = [Entry::advancing(to_pool(0), to_pool(1))];
    play(deed, &mut list, GIVEN)?;
    let [given] = &list;
    row(steps, "table page for the hypervisor", given, GIVEN, done(1))
}

/// VMs without memory, from their creation to their end.
fn lives(deed: &Deed, steps: &Steps) -> Result<(), Failure> {
    let pages = deed.alloc(2 * ROOT_PAGES)?;
    let root = pages.next_multiple_of(ROOT_PAGES);
    let mut created = Counted::new("VM, creation");
    let mut vcpu = Counted::new("vCPU, creation");
    let mut begun = Counted::new("VM, begin of its end");
    let mut ended = Counted::new("VM with one vCPU, end");
    for _ in 0..VMS {
        let flags = VmFlags { protected: true, ..VmFlags::default() };
        let word = created.once(deed, HostCall::VmCreate { flags, root })?;
        let vm = VmHandle::from_word(word).ok_or_else(|| failure!("{word:#x} is no handle"))?;
        vcpu.once(deed, HostCall::VcpuCreate { vm, vcpu: 0 })?;
        begun.once(deed, HostCall::VmTeardownStart { vm })?;
        ended.once(deed, HostCall::VmTeardownFinish { vm })?;
    }
    [created, vcpu, begun, ended].iter().for_each(|row| row.report(steps));
    deed.free(pages, 2 * ROOT_PAGES)
}

/// Counts of a call whose arguments are known from the one before it.
struct Counted {
    name: &'static str,
    least: u64,
    sum: u64,
    runs: u64,
}

impl Counted {
    fn new(name: &'static str) -> Self {
        Self { name, least: u64::MAX, sum: 0, runs: 0 }
    }

    /// Makes the call once, which must succeed; returns its first value.
    fn once(&mut self, deed: &Deed, call: HostCall) -> Result<u64, Failure> {
        let mut list = [Entry::call(call)];
        play(deed, &mut list, 1)?;
        let [entry] = &list;
        let [status, outcome, value, _] = entry.results();
        if (status, outcome) != (abi::smccc::SUCCESS, 0) {
            return Err(failure!("{}: {call:?}: {:?}", self.name, Error::from_word(outcome)));
        }
        self.least = self.least.min(entry.least());
        self.sum += entry.sum(1);
        self.runs += 1;
        Ok(value)
    }

    fn report(&self, steps: &Steps) {
        steps.row(self.name, self.least, self.sum, self.runs);
    }
}
