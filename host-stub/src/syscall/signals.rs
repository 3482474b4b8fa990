//! `rt_sigaction` and `rt_sigprocmask`.

use crate::errno::Errno;
use crate::kernel::Kernel;
use crate::process::signal::Action;

const SET_SIZE: u64 = 8;

/// `rt_sigaction`.
pub fn rt_sigaction(
    kernel: &mut Kernel<'_>,
    number: u64,
    new: u64,
    old: u64,
    size: u64,
) -> Result<u64, Errno> {
    if size != SET_SIZE {
        return Err(Errno::EINVAL);
    }
    let (host, process) = (&mut kernel.host, &mut kernel.process);
    let before = process.actions.action(number)?;
    if new != 0 {
        let mut bytes = [0; Action::SIZE];
        process.space.read(host, new, &mut bytes)?;
        process.actions.set_action(number, Action::from_bytes(&bytes))?;
    }
    if old != 0 {
        process.space.write(host, old, &before.to_bytes())?;
    }
    Ok(0)
}

/// `rt_sigprocmask`.
pub fn rt_sigprocmask(
    kernel: &mut Kernel<'_>,
    how: u64,
    new: u64,
    old: u64,
    size: u64,
) -> Result<u64, Errno> {
    if size != SET_SIZE {
        return Err(Errno::EINVAL);
    }
    let (host, process) = (&mut kernel.host, &mut kernel.process);
    let before = process.thread.signals.blocked();
    if new != 0 {
        let mut bytes = [0; 8];
        process.space.read(host, new, &mut bytes)?;
        process.thread.signals.change_blocked(how, u64::from_le_bytes(bytes))?;
    }
    if old != 0 {
        process.space.write(host, old, &before.to_le_bytes())?;
    }
    Ok(0)
}
