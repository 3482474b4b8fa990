//! Calls of the host, counted at EL1 around the calling instruction.

use abi::page::Pool;
use abi::{HostCall, psci};
use host_programs::deed::Deed;
use host_programs::play::{Entry, What, play};
use host_programs::raw_vm::RawVm;
use host_programs::steps::Steps;
use host_programs::{Failure, failure};

/// Rounds of what can be done any number of times.
pub(crate) const ROUNDS: u64 = 10_000;
/// Pages that one table maps, and that a block of 2 MiB has.
pub(crate) const TABLE_PAGES: u64 = 512;
/// Blocks of 2 MiB that are donated, and that are split.
const BLOCKS: u64 = 32;
const PAGE_SIZE: u64 = 4096;
/// First guest page of the VMs here: the start of a table.
const GFN: u64 = 0x8_0000;

/// x0, x1 and x2 of a call that did this many pages.
pub(crate) const fn done(pages: u64) -> [u64; 3] {
    [abi::smccc::SUCCESS, 0, pages]
}

/// An entry that did not go the same way each round counts something else than its row says.
pub(crate) fn expect(what: &str, entry: &Entry, always: [u64; 3]) -> Result<(), Failure> {
    if entry.always(always) {
        return Ok(());
    }
    Err(failure!("{what}: not always {always:x?}; the first round gave {:x?}", entry.results()))
}

/// Prints a row.
pub(crate) fn row(
    steps: &Steps,
    name: &str,
    entry: &Entry,
    rounds: u64,
    always: [u64; 3],
) -> Result<(), Failure> {
    expect(name, entry, always)?;
    steps.row(name, entry.least(), entry.sum(rounds), rounds);
    Ok(())
}

/// Calls that concern no VM.
pub(crate) fn calls(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    const UNKNOWN: u64 = 0xc600_01ff;
    let mut list = [
        Entry::new(What::Hvc, [UNKNOWN, 0, 0, 0, 0, 0, 0]),
        Entry::new(What::Smc, [psci::VERSION.into(), 0, 0, 0, 0, 0, 0]),
    ];
    play(deed, &mut list, ROUNDS)?;
    let [unknown, version] = &list;
    row(steps, "host call with an unknown id", unknown, ROUNDS, [abi::smccc::NOT_SUPPORTED, 0, 0])?;
    row(steps, "PSCI_VERSION by SMC", version, ROUNDS, [psci::VERSION_1_1, 0, 0])?;
    let first = deed.alloc(BLOCKS * TABLE_PAGES)?;
    touch(deed, first, steps)?;
    share(deed, first, steps)?;
    deed.free(first, BLOCKS * TABLE_PAGES)
}

/// The host's first touch of memory, less a second touch: a stage-2 fault would show.
fn touch(deed: &Deed, first: u64, steps: &mut Steps) -> Result<(), Failure> {
    let rounds = BLOCKS * TABLE_PAGES;
    let loads = Entry::loads(first * PAGE_SIZE, PAGE_SIZE);
    let (mut cold, mut warm) = ([loads], [loads]);
    play(deed, &mut cold, rounds)?;
    play(deed, &mut warm, rounds)?;
    let ([cold], [warm]) = (cold, warm);
    let most = cold.most().saturating_sub(warm.least());
    steps.equal("no-first-touch-costs-more-than-a-second", 0, most);
    let sum = cold.sum(rounds).saturating_sub(warm.sum(rounds));
    steps.row("host first touch of RAM it owns", most, sum, rounds);
    Ok(())
}

/// Sharing with the hypervisor; the first one in a block splits it.
fn share(deed: &Deed, first: u64, steps: &mut Steps) -> Result<(), Failure> {
    let start = first.next_multiple_of(TABLE_PAGES);
    let blocks = BLOCKS - 1;
    let tables = deed.alloc(2 * BLOCKS)?;
    deed.top_up(Pool::Tables, tables, 2 * BLOCKS)?;
    // The first block shares a table of a higher level with all that was split before.
    deed.must(HostCall::ShareHyp { pfn: start, pages: 1 })?;
    deed.must(HostCall::UnshareHyp { pfn: start, pages: 1 })?;

    let pages = 1;
    let mut list = [
        Entry::call(HostCall::ShareHyp { pfn: start, pages }),
        Entry::call(HostCall::UnshareHyp { pfn: start, pages }),
        Entry::call(HostCall::UnshareHyp { pfn: start, pages }),
    ];
    play(deed, &mut list, ROUNDS)?;
    let [share, unshare, refused] = &list;
    row(steps, "host share hyp, one page", share, ROUNDS, done(1))?;
    row(steps, "host unshare hyp, one page", unshare, ROUNDS, done(1))?;
    row(steps, "refused unshare", refused, ROUNDS, [0, abi::Error::Permission.to_word(), 0])?;

    let whole = |pfn| HostCall::ShareHyp { pfn, pages: 448 };
    let back = |pfn| HostCall::UnshareHyp { pfn, pages: 448 };
    let mut list = [Entry::call(whole(start)), Entry::call(back(start))];
    play(deed, &mut list, ROUNDS / 10)?;
    let [many, _] = &list;
    row(steps, "host share hyp, 448 pages", many, ROUNDS / 10, done(448))?;

    let fresh = start + TABLE_PAGES;
    let at = |block: u64| HostCall::ShareHyp { pfn: fresh + block * TABLE_PAGES, pages };
    let mut list = [Entry::advancing(at(0), at(1))];
    play(deed, &mut list, blocks - 1)?;
    let [split] = &list;
    let sum = split.sum(blocks - 1).saturating_sub(share.least() * (blocks - 1));
    expect("split of a 2 MiB block", split, done(1))?;
    steps.row("split of a 2 MiB block", split.least().saturating_sub(share.least()), sum, blocks - 1);
    for block in 0..blocks - 1 {
        deed.must(HostCall::UnshareHyp { pfn: fresh + block * TABLE_PAGES, pages })?;
    }
    Ok(())
}

/// Donation of single pages, and their return from a dying VM.
pub(crate) fn guests_memory(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    let first = deed.alloc(2 * TABLE_PAGES)?;
    let pfn = first.next_multiple_of(TABLE_PAGES);
    let mut vm = RawVm::protected(deed)?;
    let handle = vm.handle();
    let donate = |page| HostCall::DonateGuest { vm: handle, pfn: pfn + page, gfn: GFN + page, pages: 1 };
    vm.must(deed, donate(0))?;
    let rounds = TABLE_PAGES - 1;
    let mut list = [Entry::advancing(donate(1), donate(2))];
    play(deed, &mut list, rounds)?;
    let [donated] = &list;
    row(steps, "host donate guest, one page, tables present", donated, rounds, done(1))?;

    deed.must(HostCall::VmTeardownStart { vm: handle })?;
    let reclaim = |page| HostCall::ReclaimGuest { vm: handle, gfn: GFN + page, pages: 1 };
    let mut list = [Entry::advancing(reclaim(0), reclaim(1))];
    play(deed, &mut list, TABLE_PAGES)?;
    let [reclaimed] = &list;
    row(steps, "reclaim from a dying VM, one page, wiped", reclaimed, TABLE_PAGES, done(1))?;
    vm.finish(deed)?;
    deed.free(first, 2 * TABLE_PAGES)
}

/// Donation of whole blocks, a page of them at a time in the row. `which` is `-`, or what the row's name adds.
pub(crate) fn blocks(deed: &Deed, which: &str, steps: &mut Steps) -> Result<(), Failure> {
    let first = deed.alloc((BLOCKS + 2) * TABLE_PAGES)?;
    let start = first.next_multiple_of(TABLE_PAGES);
    let mut vm = RawVm::protected(deed)?;
    let handle = vm.handle();
    let donate = |block: u64| HostCall::DonateGuest {
        vm: handle,
        pfn: start + block * TABLE_PAGES,
        gfn: GFN + block * TABLE_PAGES,
        pages: TABLE_PAGES,
    };
    vm.must(deed, donate(0))?;
    let mut list = [Entry::advancing(donate(1), donate(2))];
    play(deed, &mut list, BLOCKS)?;
    let [donated] = &list;
    let name = match which {
        "-" => "host donate guest, 2 MiB block, per 4 KiB",
        "S2FWB" => "host donate guest, 2 MiB block, per 4 KiB, FEAT_S2FWB",
        _ => return Err(failure!("which blocks?")),
    };
    expect(name, donated, done(TABLE_PAGES))?;
    let each = |ticks: u64| ticks.div_ceil(TABLE_PAGES);
    steps.row(name, each(donated.least()), each(donated.sum(BLOCKS)), BLOCKS);

    deed.must(HostCall::VmTeardownStart { vm: handle })?;
    for block in 0..=BLOCKS {
        deed.must(HostCall::ReclaimGuest { vm: handle, gfn: GFN + block * TABLE_PAGES, pages: TABLE_PAGES })?;
    }
    vm.finish(deed)?;
    deed.free(first, (BLOCKS + 2) * TABLE_PAGES)
}
