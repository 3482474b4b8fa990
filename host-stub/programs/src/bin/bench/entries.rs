//! Runs of a vCPU: what EL2 does between the host's call and its return, the guest's instructions included.

use abi::page::VmFlags;
use abi::{Exit, HostCall, VmHandle};
use host_programs::deed::Deed;
use host_programs::play::{Entry, play};
use host_programs::raw_vm::RawVm;
use host_programs::steps::Steps;
use host_programs::{Failure, failure};

use crate::code::Code;
use crate::host::{ROUNDS, TABLE_PAGES, expect, row};

const PAGE_SIZE: u64 = 4096;
/// The page that holds the guest's code.
const CODE: u64 = 0x8_0000;
/// What the guest works on: pages of another table of level 3 than its code's.
const DATA: u64 = CODE + TABLE_PAGES;
/// A page without memory.
const DEVICE: u64 = 0x9000;
/// Runs until a guest is where it should be.
const SETTLING: usize = 32;

const WAIT: u64 = 1;
const MISSING_PAGE: u64 = 2;
const MMIO: u64 = 3;
const UNSHARE: u64 = 4;
const GUEST_CALL: u64 = 6;

/// x0, x1 and x2 of a run that ended for this reason.
const fn exit(reason: u64) -> [u64; 3] {
    [abi::smccc::SUCCESS, 0, reason]
}

const DONE_ONE: [u64; 3] = [abi::smccc::SUCCESS, 0, 1];

/// All rows.
pub(crate) fn rows(deed: &Deed, steps: &Steps) -> Result<(), Failure> {
    let pair = single(deed, Code::Wait, WAIT, "enter and leave a vCPU", steps)?;
    single(deed, Code::Forward, GUEST_CALL, "guest call served by the host, EL2 part", steps)?;
    single(deed, Code::Device, MMIO, "guest MMIO served by the VMM, EL2 part", steps)?;
    missing(deed, Code::Touch, "guest first touch of a page, EL2 part", steps)?;
    missing(deed, Code::Share, "guest MEM_SHARE of an unmapped page, EL2 part", steps)?;
    unshare(deed, &pair, steps)
}

/// One exit and one entry, over and over.
fn single(deed: &Deed, code: Code, reason: u64, name: &str, steps: &Steps) -> Result<Entry, Failure> {
    let mut bare = Bare::new(deed, code, DEVICE * PAGE_SIZE)?;
    bare.settle(deed, reason)?;
    let mut list = [Entry::call(bare.run())];
    play(deed, &mut list, ROUNDS)?;
    let [run] = list;
    row(steps, name, &run, ROUNDS, exit(reason))?;
    bare.end(deed, &[])?;
    Ok(run)
}

/// The guest lacks a page, the host gives it, the guest goes on to the next one.
fn missing(deed: &Deed, code: Code, name: &str, steps: &Steps) -> Result<(), Failure> {
    let mut bare = Bare::new(deed, code, DATA * PAGE_SIZE)?;
    let pages = deed.alloc(2 * TABLE_PAGES)?;
    let first = pages.next_multiple_of(TABLE_PAGES);
    bare.settle(deed, MISSING_PAGE)?;
    let vm = bare.vm.handle();
    let donate = |page| HostCall::DonateGuest { vm, pfn: first + page, gfn: DATA + page, pages: 1 };
    bare.vm.must(deed, donate(0))?;
    let rounds = TABLE_PAGES - 2;
    let mut list = [Entry::call(bare.run()), Entry::advancing(donate(1), donate(2))];
    play(deed, &mut list, rounds)?;
    let [run, donated] = &list;
    expect(name, run, exit(MISSING_PAGE))?;
    expect(name, donated, DONE_ONE)?;
    let (least, sum) = (run.least() + donated.least(), run.sum(rounds) + donated.sum(rounds));
    steps.row(name, least, sum, rounds);
    bare.end(deed, &[(DATA, rounds + 1)])?;
    deed.free(pages, 2 * TABLE_PAGES)
}

/// An unshare that asks the host: the exit, the acknowledgement and the entry after it.
fn unshare(deed: &Deed, pair: &Entry, steps: &Steps) -> Result<(), Failure> {
    let mut bare = Bare::new(deed, Code::Unshare, DATA * PAGE_SIZE)?;
    let page = deed.alloc(1)?;
    let vm = bare.vm.handle();
    bare.vm.must(deed, HostCall::DonateGuest { vm, pfn: page, gfn: DATA, pages: 1 })?;
    bare.settle(deed, WAIT)?;
    let run = Entry::call(bare.run());
    let mut list = [run, Entry::call(HostCall::UnshareAck { vm, vcpu: 0 }), run, run];
    play(deed, &mut list, ROUNDS)?;
    let [asks, ack, goes_on, shares] = &list;
    let name = "guest MEM_UNSHARE that asks, EL2 part";
    for (entry, always) in
        [(asks, exit(UNSHARE)), (ack, DONE_ONE), (goes_on, exit(WAIT)), (shares, exit(WAIT))]
    {
        expect(name, entry, always)?;
    }
    // The first run enters from a wait and the last one ends in one: together one entry and exit too many.
    let sum = |entry: &Entry| entry.sum(ROUNDS);
    let least = (asks.least() + ack.least() + goes_on.least()).saturating_sub(pair.least());
    let all = (sum(asks) + sum(ack) + sum(goes_on)).saturating_sub(pair.sum(ROUNDS));
    steps.row(name, least, all, ROUNDS);
    bare.end(deed, &[(DATA, 1)])?;
    deed.free(page, 1)
}

/// A VM with a page of code and a vCPU.
struct Bare {
    vm: RawVm,
    page: u64,
}

impl Bare {
    fn new(deed: &Deed, code: Code, argument: u64) -> Result<Self, Failure> {
        let page = deed.alloc(1)?;
        for (at, word) in (page * PAGE_SIZE..).step_by(8).zip(code.words()) {
            deed.store(at, word)?;
        }
        let mut vm = RawVm::new(deed, VmFlags { protected: true, ..VmFlags::default() })?;
        let handle = vm.handle();
        vm.vcpu(deed, 0)?;
        vm.must(deed, HostCall::DonateGuest { vm: handle, pfn: page, gfn: CODE, pages: 1 })?;
        deed.must(HostCall::VcpuSetBoot { vm: handle, vcpu: 0, pc: CODE * PAGE_SIZE, x0: argument })?;
        Ok(Self { vm, page })
    }

    fn run(&self) -> HostCall {
        HostCall::VcpuRun { vm: self.vm.handle(), vcpu: 0, values: [0; 4] }
    }

    /// Runs the guest until its first exit for this reason; gives it the table pages that it lacks.
    fn settle(&mut self, deed: &Deed, until: u64) -> Result<(), Failure> {
        for _ in 0..SETTLING {
            let values = deed.must(self.run())?;
            let [reason, ..] = values;
            match Exit::from_words(values) {
                _ if reason == until => return Ok(()),
                Some(Exit::Interrupted) => {}
                Some(Exit::NeedPages { pages, .. }) => self.vm.give_tables(deed, pages)?,
                other => return Err(failure!("the guest should come to exit {until}: {other:?}")),
            }
        }
        Err(failure!("the guest does not come to exit {until}"))
    }

    /// Ends it: its code comes back, and these runs of its pages.
    fn end(self, deed: &Deed, runs: &[(u64, u64)]) -> Result<(), Failure> {
        let vm = self.vm.handle();
        deed.must(HostCall::VmTeardownStart { vm })?;
        for (gfn, pages) in runs.iter().copied().chain([(CODE, 1)]) {
            reclaim(deed, vm, gfn, pages)?;
        }
        self.vm.finish(deed)?;
        deed.free(self.page, 1)
    }
}

fn reclaim(deed: &Deed, vm: VmHandle, mut gfn: u64, pages: u64) -> Result<(), Failure> {
    let end = gfn + pages;
    while gfn < end {
        let [done, ..] = deed.must(HostCall::ReclaimGuest { vm, gfn, pages: end - gfn })?;
        if done == 0 {
            return Err(failure!("nothing of {gfn:#x} comes back"));
        }
        gfn += done;
    }
    Ok(())
}
