//! The locks and atomics of the core, all from here.
//!
//! | build | a lock is | and |
//! |---|---|---|
//! | target | `spin`'s, an atomic `core`'s, and nothing else | |
//! | tests | the same | it knows its [`Lock`] name, and each thread the locks that it holds: [`order`] |
//! | `--cfg deed_shuttle` | shuttle's, as are atomics | each use is a point where another CPU may go on |
//!
//! Locks are taken in the order of [`Lock`], and no two of one kind together: never two VMs.

#[cfg(any(test, feature = "sim"))]
pub mod order;

use core::ops::{Deref, DerefMut};

#[cfg(not(deed_shuttle))]
pub use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
#[cfg(deed_shuttle)]
pub use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};

#[cfg(deed_shuttle)]
use shuttle::sync as source;
#[cfg(not(deed_shuttle))]
use spin as source;

/// What a lock guards. They are taken in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// The choice of a slot for a new VM.
    Creation,
    /// The host's stage-2, and the pool of tables.
    Host,
    /// EL2's own stage-1, and pins.
    Hyp,
    /// The VM in this slot, its stage-2 and its pool.
    Vm(u8),
    /// The oracle's own state.
    #[cfg(feature = "oracle")]
    Oracle,
    /// The heap of records.
    Records,
    /// Which CPUs are on.
    Cpus,
}

/// A lock with what it guards.
#[derive(Debug)]
pub struct Mutex<T> {
    #[cfg(any(test, feature = "sim"))]
    name: Lock,
    inner: source::Mutex<T>,
}

/// A lock that is held.
#[derive(Debug)]
pub struct MutexGuard<'a, T> {
    inner: source::MutexGuard<'a, T>,
    #[cfg(any(test, feature = "sim"))]
    _held: order::Held,
}

impl<T> Mutex<T> {
    /// A lock of this name, open.
    #[cfg_attr(not(any(test, feature = "sim")), expect(unused_variables, reason = "names are for tests"))]
    pub const fn new(name: Lock, value: T) -> Self {
        Self {
            #[cfg(any(test, feature = "sim"))]
            name,
            inner: source::Mutex::new(value),
        }
    }

    /// Waits for the lock and takes it.
    #[inline]
    #[track_caller]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        #[cfg(any(test, feature = "sim"))]
        let held = order::Held::note(self.name);
        let inner = take(&self.inner);
        MutexGuard {
            inner,
            #[cfg(any(test, feature = "sim"))]
            _held: held,
        }
    }

    /// Takes the lock if it is open: for whoever must not wait, since the holder may never go on.
    #[cfg(not(any(test, feature = "sim")))]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.inner.try_lock().map(|inner| MutexGuard { inner })
    }
}

/// How often some thread has waited for another, for tests that must see one wait.
#[cfg(test)]
pub(crate) static WAITS: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(0);

/// Tells the CPU, or shuttle, that this one waits for another. `core`'s hint for that is ISB on Arm; YIELD is the
/// architecture's (Arm ARM C6.2, YIELD), by which an emulator lets the other go on.
pub fn relax() {
    #[cfg(test)]
    WAITS.fetch_add(1, core::sync::atomic::Ordering::Relaxed);
    #[cfg(all(target_arch = "aarch64", target_os = "none"))]
    crate::arch::instructions::yield_to_others();
    #[cfg(not(any(deed_shuttle, all(target_arch = "aarch64", target_os = "none"))))]
    core::hint::spin_loop();
    #[cfg(deed_shuttle)]
    shuttle::hint::spin_loop();
}

#[cfg(not(deed_shuttle))]
#[inline]
fn take<T>(lock: &source::Mutex<T>) -> source::MutexGuard<'_, T> {
    lock.try_lock().unwrap_or_else(|| wait_for(lock))
}

/// Apart from [`take`], so that the wait is not repeated wherever a lock is taken.
#[cfg(not(deed_shuttle))]
#[cold]
#[inline(never)]
fn wait_for<T>(lock: &source::Mutex<T>) -> source::MutexGuard<'_, T> {
    loop {
        relax();
        if let Some(guard) = lock.try_lock() {
            return guard;
        }
    }
}

/// The thread that failed has said why; the others' last words are of interest too.
#[cfg(deed_shuttle)]
fn take<T>(lock: &source::Mutex<T>) -> source::MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}
