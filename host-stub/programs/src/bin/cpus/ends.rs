//! VMs end while another CPU runs them.

use abi::{Error, HostCall};
use guest_stub::protocol::player::LOAD;
use host_programs::cpu::{Cpu, PATIENCE, WARM};
use host_programs::deed::Deed;
use host_programs::player::Player;
use host_programs::steps::Steps;
use host_programs::{Failure, failure, sys};

/// VMs that end.
const ROUNDS: u64 = 20;

/// The end of a VM begins while CPU 1 runs its vCPU again and again: not before the vCPU is out of its guest, and then the
/// vCPU does not come in any more.
pub(crate) fn begin(deed: &Deed, steps: &mut Steps) -> Result<(), Failure> {
    steps.tell("CPU 1 runs a vCPU again and again, and CPU 0 begins the end of its VM.");
    let (mut held_off, mut refused) = (0, 0);
    for _ in 0..ROUNDS {
        let player = Player::new(deed, true)?;
        let vm = player.handle();
        let mut cpu = Cpu::on(deed, 1)?;
        cpu.series().clear();
        cpu.series().call(HostCall::VcpuRun { vm, vcpu: 1, values: [LOAD, Player::address(0), 0, 0] });
        cpu.play(0, false)?;
        let limit = sys::now() + PATIENCE;
        while cpu.progress()?.rounds < WARM {
            within(limit, "the vCPU to run")?;
        }
        let limit = sys::now() + PATIENCE;
        loop {
            let answer = deed.call(HostCall::VmTeardownStart { vm })?;
            if answer.ok().is_some() {
                break;
            }
            if !answer.is_error(Error::Busy) {
                return Err(failure!("the end of a VM that runs: {answer}"));
            }
            held_off += 1;
            within(limit, "the end to begin")?;
        }
        cpu.goes_on()?;
        cpu.end(false)?;
        refused += u64::from(cpu.series().answer(0).is_error(Error::Permission));
        cpu.off()?;
        player.take_apart(deed, &[])?;
    }
    steps.check("the-end-of-a-vm-waits-for-its-vcpu", "more than 0 times", held_off, held_off > 0);
    steps.equal("no-vcpu-runs-once-the-end-has-begun", ROUNDS, refused);
    Ok(())
}

fn within(limit: u64, what: &str) -> Result<(), Failure> {
    if sys::now() > limit { Err(failure!("waited too long for {what}")) } else { Ok(()) }
}
