//! CPUs go and come while it changes whose pages are.

use abi::{HostCall, VmFlags};
use host_programs::cpu::Cpu;
use host_programs::deed::{Deed, Touch};
use host_programs::raw_vm::RawVm;
use host_programs::series::Series;
use host_programs::steps::Steps;
use host_programs::{Failure, failure};

/// Times that each CPU goes and comes.
const ROUNDS: u64 = 20;
const GFN: u64 = 0x8_0000;

/// Two CPUs turn the machine off at once: it ends once. Returns only if neither can.
pub(crate) fn end_together(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("Both CPUs turn the machine off, at the same time.");
    let mut cpu = Cpu::on(deed, 1)?;
    let flag = deed.alloc(1)? << 12;
    let stored = deed.store(flag, 0)?;
    let off = [abi::psci::SYSTEM_OFF.into(), 0, 0, 0];
    let series = cpu.series();
    series.wait_for(flag, 1);
    series.smc(off);
    cpu.play(1, false)?;
    let mut own = Series::default();
    own.store(flag, 1);
    own.smc(off);
    steps.check("both-cpus-are-ready", Touch::Done(0), stored, stored == Touch::Done(0));
    steps.finish();
    deed.series(&mut own)?;
    Err(failure!("the machine goes on"))
}

/// Turns every other CPU off and on, again and again.
pub(crate) fn go_and_come(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    let others = Cpu::count(deed)? - 1;
    steps.tell(
        "The other CPUs go off and come on, one after the other; each time a page has become a guest's.",
    );
    let mut vm = RawVm::new(deed, VmFlags { protected: true, ..VmFlags::default() })?;
    let handle = vm.handle();
    let pages = deed.alloc(2 * ROUNDS)?;
    let (mut lost, mut kept) = (0, 0);
    for round in 0..ROUNDS {
        let (leaves, stays) = (pages + 2 * round, pages + 2 * round + 1);
        deed.store(stays << 12, round)?;
        for number in 1..=others {
            let mut cpu = Cpu::on(deed, number)?;
            cpu.spin(leaves << 12, None)?;
            cpu.end(false)?;
            cpu.off()?;
        }
        // The last one comes while the page goes: whichever is first, it must not keep what it sees.
        let mut coming = Cpu::on(deed, others)?;
        coming.series().load(leaves << 12);
        coming.play(0, false)?;
        vm.must(deed, HostCall::DonateGuest { vm: handle, pfn: leaves, gfn: GFN + round, pages: 1 })?;
        let spun = coming.spun()?;
        let mut all = spun.is_injected_abort(leaves << 12);
        coming.off()?;
        for number in 1..=others {
            let mut cpu = Cpu::on(deed, number)?;
            cpu.series().load(leaves << 12);
            cpu.series().load(stays << 12);
            cpu.play(1, true)?;
            cpu.end(true)?;
            all &= cpu.series().touched(0).is_injected_abort(leaves << 12);
            kept += u64::from(cpu.series().touched(1) == Touch::Done(round));
            cpu.off()?;
        }
        if !all {
            break;
        }
        lost += 1;
    }
    steps.equal("a-cpu-that-comes-back-finds-no-page-that-is-a-guests", ROUNDS, lost);
    steps.equal("and-finds-those-that-are-the-hosts", ROUNDS * others, kept);

    deed.must(HostCall::VmTeardownStart { vm: handle })?;
    for round in 0..ROUNDS {
        deed.must(HostCall::ReclaimGuest { vm: handle, gfn: GFN + round, pages: 1 })?;
    }
    vm.finish(deed)?;
    deed.free(pages, 2 * ROUNDS)
}
