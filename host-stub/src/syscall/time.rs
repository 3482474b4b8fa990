//! `clock_gettime` and `nanosleep`.

use crate::errno::Errno;
use crate::kernel::Kernel;
use crate::threads::Wait;

const CLOCK_REALTIME: u64 = 0;
const CLOCK_MONOTONIC: u64 = 1;
const NANOSECONDS: u64 = 1_000_000_000;

/// `clock_gettime`. There is no clock of the wall's time: it is time since boot.
pub fn clock_gettime(kernel: &mut Kernel<'_>, clock: u64, buffer: u64) -> Result<u64, Errno> {
    if !matches!(clock, CLOCK_REALTIME | CLOCK_MONOTONIC) {
        return Err(Errno::EINVAL);
    }
    let now = kernel.host.machine.now();
    let mut bytes = [0; 16];
    let (seconds, rest) = bytes.split_at_mut(8);
    seconds.copy_from_slice(&(now / NANOSECONDS).to_le_bytes());
    rest.copy_from_slice(&(now % NANOSECONDS).to_le_bytes());
    kernel.process.space.write(&mut kernel.host, buffer, &bytes)?;
    Ok(0)
}

/// `nanosleep`: until when. What is left after a signal is not told.
pub fn nanosleep(kernel: &mut Kernel<'_>, request: u64) -> Result<Wait, Errno> {
    deadline(kernel, request).map(Wait::Time)
}

/// When the time of a program's `struct timespec` will have passed.
pub fn deadline(kernel: &mut Kernel<'_>, request: u64) -> Result<u64, Errno> {
    let mut bytes = [0; 16];
    kernel.process.space.read(&mut kernel.host, request, &mut bytes)?;
    let (words, _) = bytes.as_chunks::<8>();
    let [seconds, rest] = words else { return Err(Errno::EFAULT) };
    let (seconds, rest) = (u64::from_le_bytes(*seconds), u64::from_le_bytes(*rest));
    if rest >= NANOSECONDS || i64::try_from(seconds).is_err() {
        return Err(Errno::EINVAL);
    }
    let start = kernel.host.machine.now();
    Ok(start.saturating_add(seconds.saturating_mul(NANOSECONDS)).saturating_add(rest))
}
