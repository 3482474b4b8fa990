//! guest_memfd as its VMM waits for it: faults of a mapping, and pages given up.

use guest_stub::protocol::{PAGE_SIZE, RAM_SIZE};
use host_programs::kvm::Kvm;
use host_programs::machine::Machine;
use host_programs::play::EMPTY;
use host_programs::steps::Steps;
use host_programs::sys::Mapping;
use host_programs::uapi::kvm;
use host_programs::{Failure, arch, failure};

const PAGES: u64 = RAM_SIZE / PAGE_SIZE;
/// Pages of one hole.
const HOLE: u64 = 64;

/// All rows.
pub(crate) fn rows(steps: &Steps) -> Result<(), Failure> {
    let vm = Kvm::open()?.create_vm(kvm::VM_TYPE_PROTECTED)?;
    let (file, first) = Machine::memory(&vm)?;
    faults(&first, "guest_memfd: host mmap fault, page allocated", steps);
    let second = file.map(RAM_SIZE)?;
    faults(&second, "guest_memfd: host mmap fault, page present", steps);
    let (mut least, mut sum) = (u64::MAX, 0);
    for hole in 0..PAGES / HOLE {
        let begin = arch::counter();
        let done = file.punch(hole * HOLE * PAGE_SIZE, HOLE * PAGE_SIZE);
        let took = arch::counter().wrapping_sub(begin).saturating_sub(EMPTY);
        done.map_err(|error| failure!("a hole: {error}"))?;
        least = least.min(took);
        sum += took;
    }
    let each = |ticks: u64| ticks.div_ceil(HOLE);
    steps.row("guest_memfd: punch hole, per page", each(least), each(sum), PAGES / HOLE);
    Ok(())
}

/// The first touch of each page of a mapping.
fn faults(mapping: &Mapping, name: &str, steps: &Steps) {
    let (mut least, mut sum) = (u64::MAX, 0);
    for page in 0..PAGES {
        let took = mapping.timed_load(page * PAGE_SIZE).saturating_sub(EMPTY);
        least = least.min(took);
        sum += took;
    }
    steps.row(name, least, sum, PAGES);
}
