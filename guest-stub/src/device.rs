//! The guest's one device: registers in a page that the VMM emulates, see [`crate::protocol`].

use core::fmt;

use crate::protocol::{self, Command};
use crate::{arch, call};

/// The device, which the guest has enrolled: from then on the hypervisor shows accesses to this page, and
/// to no other, to the host.
#[derive(Debug)]
pub struct Device {
    _private: (),
}

impl Device {
    /// Enrols the guest with `MMIO_GUARD` and maps the device's page; returns the device and the two
    /// calls' statuses.
    pub fn enrol_with_status() -> (Self, [u64; 2]) {
        let [enrolled, ..] = call::call(abi::guest::MMIO_GUARD_ENROLL, 0, 0, 0);
        let [mapped, ..] = call::call(abi::guest::MMIO_GUARD_MAP, protocol::DEVICE_BASE, 1, 0);
        (Self { _private: () }, [enrolled, mapped])
    }

    /// Enrols the device; a guest that cannot has nobody to tell and powers off.
    pub fn enrol() -> Self {
        let (device, statuses) = Self::enrol_with_status();
        if statuses != [abi::smccc::SUCCESS; 2] {
            call::system_off();
        }
        device
    }

    /// Takes the device without enrolling: for a guest whose VMM sees every access without memory.
    pub fn unguarded() -> Self {
        Self { _private: () }
    }

    /// Loads a value that the VMM provides.
    pub fn value(&self, index: usize) -> u64 {
        arch::load64(protocol::DEVICE_BASE + protocol::VALUE + 8 * index as u64)
    }

    /// Stores data words and rings the doorbell.
    pub fn command(&mut self, command: Command, data: &[u64]) {
        for (index, word) in data.iter().take(protocol::DATA_WORDS).enumerate() {
            arch::store64(protocol::DEVICE_BASE + protocol::DATA + 8 * index as u64, *word);
        }
        arch::store64(protocol::DEVICE_BASE + protocol::DOORBELL, command as u64);
    }

    /// Tells the VMM that a point is reached; returns when the VMM runs the guest again.
    pub fn phase(&mut self, phase: u64, data: &[u64]) {
        let mut words = [0; protocol::DATA_WORDS];
        let (first, rest) = words.split_at_mut(1);
        first.fill(phase);
        for (word, value) in rest.iter_mut().zip(data) {
            *word = *value;
        }
        self.command(Command::Phase, &words);
    }

    /// Sends a line for people.
    pub fn say(&mut self, line: fmt::Arguments<'_>) {
        self.text(line);
        self.command(Command::Say, &[]);
    }

    /// Reports a step that the guest has checked: it passed if `observed` is `expected`.
    pub fn check(&mut self, name: &str, expected: u64, observed: u64) {
        self.text(format_args!("{name}"));
        self.command(Command::Check, &[expected, observed]);
    }

    /// Reports an operation that the guest has counted.
    pub fn row(&mut self, operation: &str, least: u64, sum: u64, runs: u64) {
        self.text(format_args!("{operation}"));
        self.command(Command::Row, &[least, sum, runs]);
    }

    /// Reports why the guest gives up.
    pub fn give_up(&mut self, why: fmt::Arguments<'_>) {
        self.text(why);
        self.command(Command::Panic, &[]);
    }

    fn text(&mut self, text: fmt::Arguments<'_>) {
        // Writing to the device cannot fail.
        let _ = fmt::Write::write_fmt(&mut TextStream, text);
    }
}

struct TextStream;

impl fmt::Write for TextStream {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for bytes in text.as_bytes().chunks(8) {
            arch::store64(protocol::DEVICE_BASE + protocol::TEXT, protocol::text_word(bytes));
        }
        Ok(())
    }
}
