//! The host's own pages are given away while another CPU of the host's reads or writes them without a pause. It
//! makes no call and takes no interrupt: nothing but the hypervisor's invalidation can tell it.

use abi::page::Pool;
use abi::{HostCall, VmFlags};
use host_programs::cpu::Cpu;
use host_programs::deed::Deed;
use host_programs::raw_vm::RawVm;
use host_programs::steps::Steps;
use host_programs::{Failure, failure};

/// What the other CPU stores.
const MARK: u64 = 0x5b1b_5b1b_5b1b_5b1b;
const GFN: u64 = 0x8_0000;
/// Pages of the range that is given in one call.
const RANGE: u64 = 16;

/// Each way for a page to leave.
pub(crate) fn leave(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("CPU 1 reads or writes a page for ever; CPU 0 gives the page away.");
    let mut cpu = Cpu::on(deed, 1)?;
    let mut vm = RawVm::new(deed, VmFlags { protected: true, ..VmFlags::default() })?;
    let handle = vm.handle();
    let range = deed.alloc(RANGE)?;

    spin(&mut cpu, range, false)?;
    let donation = HostCall::DonateGuest { vm: handle, pfn: range, gfn: GFN, pages: 1 };
    vm.must(deed, donation)?;
    lost("a-cpu-that-reads-loses-a-donated-page", &mut cpu, range, steps)?;

    spin(&mut cpu, range + 1, true)?;
    vm.must(deed, HostCall::DonateGuest { vm: handle, pfn: range + 1, gfn: GFN + 1, pages: 1 })?;
    lost("a-cpu-that-writes-loses-a-donated-page", &mut cpu, range + 1, steps)?;

    spin(&mut cpu, range + RANGE - 1, false)?;
    let (pfn, pages) = (range + 2, RANGE - 2);
    vm.must(deed, HostCall::DonateGuest { vm: handle, pfn, gfn: GFN + 2, pages })?;
    lost("a-cpu-loses-the-last-page-of-a-donated-range", &mut cpu, range + RANGE - 1, steps)?;

    let table = deed.alloc(1)?;
    spin(&mut cpu, table, true)?;
    vm.must(deed, HostCall::VmTopUp { vm: handle, pfn: table, pages: 1 })?;
    lost("a-cpu-loses-a-page-for-a-vms-tables", &mut cpu, table, steps)?;

    let pool = deed.alloc(1)?;
    spin(&mut cpu, pool, true)?;
    deed.top_up(Pool::Metadata, pool, 1)?;
    lost("a-cpu-loses-a-page-for-records", &mut cpu, pool, steps)?;

    let second = RawVm::over(deed, VmFlags { protected: true, ..VmFlags::default() }, |root| {
        spin(&mut cpu, root + 1, true)
    })?;
    let root = second.root() + 1;
    lost("a-cpu-loses-a-page-of-a-vms-root", &mut cpu, root, steps)?;
    second.end(deed)?;

    steps.tell("The pages come back, and CPU 1 reads what it must find in them.");
    deed.must(HostCall::VmTeardownStart { vm: handle })?;
    for (page, name) in [(0, "a-cpu-finds-zeros-in-a-reclaimed-page"), (1, "and-not-what-it-wrote-there")] {
        deed.must(HostCall::ReclaimGuest { vm: handle, gfn: GFN + page, pages: 1 })?;
        spin(&mut cpu, range + page, false)?;
        cpu.end(false)?;
        let touch = cpu.series().touched(0);
        steps.check(name, "done, value 0x0", touch, touch == host_programs::deed::Touch::Done(0));
    }
    deed.must(HostCall::ReclaimGuest { vm: handle, gfn: GFN + 2, pages: RANGE - 2 })?;
    vm.finish(deed)?;
    deed.free(table, 1)?;
    deed.free(range, RANGE)?;
    cpu.off()
}

fn spin(cpu: &mut Cpu<'_>, pfn: u64, write: bool) -> Result<(), Failure> {
    cpu.spin(pfn << 12, write.then_some(MARK))
}

fn lost(name: &str, cpu: &mut Cpu<'_>, pfn: u64, steps: &mut Steps) -> Result<(), Failure> {
    let spun = cpu.spun()?;
    if steps.check(name, "an injected abort", spun, spun.is_injected_abort(pfn << 12)) {
        Ok(())
    } else {
        Err(failure!("CPU 1 keeps what is not the host's any more"))
    }
}
