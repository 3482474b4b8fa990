//! A block is split because one of its pages leaves, while another CPU uses a page beside it, which stays the host's.

use abi::{HostCall, VmFlags};
use host_programs::Failure;
use host_programs::cpu::Cpu;
use host_programs::deed::Deed;
use host_programs::raw_vm::RawVm;
use host_programs::steps::Steps;

/// Pages of a block.
const BLOCK: u64 = 512;
/// Blocks that are split: each is broken for so short a time that the other CPU only now and then falls into it.
const BLOCKS: u64 = 256;
/// Page of a block that leaves, and the one that the other CPU uses.
const LEAVES: u64 = 7;
const STAYS: u64 = 300;
const GFN: u64 = 0x8_0000;
const MARK: u64 = 0x0b10_c0b1_0c0b_10c0;
/// Times that a page is given away while both CPUs use it.
const CONTESTS: u64 = 200;

/// Splits many blocks.
pub(crate) fn split(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("CPU 1 writes and reads a page for ever; CPU 0 gives another page of the same block away.");
    let mut cpu = Cpu::on(deed, 1)?;
    let mut vm = RawVm::new(deed, VmFlags { protected: true, ..VmFlags::default() })?;
    let handle = vm.handle();
    let allocated = deed.alloc((BLOCKS + 1) * BLOCK)?;
    let first = allocated.next_multiple_of(BLOCK);

    let (mut went_on, mut kept) = (0, 0);
    let retried = retried(deed)?;
    for block in 0..BLOCKS {
        let pfn = first + block * BLOCK;
        let stays = (pfn + STAYS) << 12;
        cpu.spin(stays, Some(MARK + block))?;
        vm.must(deed, HostCall::DonateGuest { vm: handle, pfn: pfn + LEAVES, gfn: GFN + block, pages: 1 })?;
        went_on += u64::from(cpu.goes_on()?);
        cpu.end(false)?;
        kept += u64::from(deed.load(stays)? == host_programs::deed::Touch::Done(MARK + block));
    }
    steps.equal("a-cpu-goes-on-beside-a-page-that-leaves-its-block", BLOCKS, went_on);
    steps.equal("and-what-it-writes-is-there", BLOCKS, kept);
    match (retried, self::retried(deed)?) {
        (Some(before), Some(now)) => {
            let count = now - before;
            steps.check("accesses-to-a-broken-block-are-made-again", "at least 1", count, count > 0);
        }
        _ => steps.skip("accesses-to-a-broken-block-are-made-again", "this build has no test calls"),
    }

    steps.tell("Both CPUs use one page, which CPU 0 gives away and takes back by force, again and again.");
    let contested = first + STAYS;
    cpu.series().clear();
    cpu.series().store(contested << 12, MARK);
    cpu.series().load(contested << 12);
    cpu.play(0, true)?;
    let (mut gone, mut back) = (0, 0);
    for contest in 0..CONTESTS {
        let gfn = GFN + BLOCK + contest;
        vm.must(deed, HostCall::DonateGuest { vm: handle, pfn: contested, gfn, pages: 1 })?;
        gone += u64::from(deed.load(contested << 12)?.is_injected_abort(contested << 12));
        let aborts = cpu.progress()?.aborts;
        while cpu.progress()?.aborts == aborts {}
        deed.must(HostCall::ForceReclaim { pfn: contested, pages: 1 })?;
        // Zeros, or what CPU 1 has stored since.
        let found = deed.load(contested << 12)?;
        let expected = [0, MARK].map(host_programs::deed::Touch::Done);
        back += u64::from(expected.contains(&found));
    }
    let progress = cpu.end(false)?;
    steps.equal("a-page-that-two-cpus-use-leaves-both", CONTESTS, gone);
    steps.equal("and-comes-back-to-both", CONTESTS, back);
    let aborts = progress.aborts;
    let many = format_args!("at least {CONTESTS} aborts");
    steps.check("and-the-other-cpu-notices-each-time", many, aborts, aborts >= CONTESTS);

    deed.must(HostCall::VmTeardownStart { vm: handle })?;
    for block in 0..BLOCKS {
        deed.must(HostCall::ReclaimGuest { vm: handle, gfn: GFN + block, pages: 1 })?;
    }
    vm.finish(deed)?;
    deed.free(allocated, (BLOCKS + 1) * BLOCK)?;
    cpu.off()
}

/// Aborts that were taken from the host in vain; `None` in a build without test calls.
fn retried(deed: &Deed) -> Result<Option<u64>, Failure> {
    Ok(deed.call(HostCall::TestCounters)?.ok().map(|result| result.values[1]))
}
