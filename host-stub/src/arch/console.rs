//! The console: a PL011, and the log on it.
//!
//! Guarded by a lock, since the panic path may find the console in use; it then writes all the same.

use core::fmt::{self, Write};

use spin::Mutex;
use tock_registers::interfaces::{Readable, Writeable};
use tock_registers::registers::{ReadOnly, ReadWrite};
use tock_registers::{register_bitfields, register_structs};

use super::linear;

register_bitfields! [u32,
    FR [
        /// The transmit FIFO is full.
        TXFF OFFSET(5) NUMBITS(1) []
    ]
];

register_structs! {
    Pl011 {
        (0x000 => dr: ReadWrite<u32>),
        (0x004 => _reserved0),
        (0x018 => fr: ReadOnly<u32, FR::Register>),
        (0x01c => @END),
    }
}

/// Where QEMU's virt machine has it: for what is said before the device tree is read.
const DEFAULT_BASE: u64 = 0x0900_0000;

struct Console {
    base: u64,
}

static CONSOLE: Mutex<Console> = Mutex::new(Console { base: DEFAULT_BASE });

impl Console {
    fn put(&self, byte: u8) {
        let Ok(address) = linear::address(self.base) else { return };
        // SAFETY: the linear map has the first GiB, where the base is (checked when it was set), as device
        // memory from the start; the registers are this driver's alone.
        let registers = unsafe { &*(address as *const Pl011) };
        while registers.fr.is_set(FR::TXFF) {
            core::hint::spin_loop();
        }
        registers.dr.set(byte.into());
    }
}

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.write_bytes(text.as_bytes());
        Ok(())
    }
}

impl Console {
    fn write_bytes(&self, bytes: &[u8]) {
        for byte in bytes {
            if *byte == b'\n' {
                self.put(b'\r');
            }
            self.put(*byte);
        }
    }
}

/// Moves the console to where the device tree says. A base that is not among the devices is ignored.
pub fn set_base(base: u64) {
    if base < super::paging::DEVICES_END && base.is_multiple_of(4) {
        CONSOLE.lock().base = base;
    }
}

/// Writes bytes.
pub fn write(bytes: &[u8]) {
    CONSOLE.lock().write_bytes(bytes);
}

/// Writes a line, whoever holds the console.
pub fn force(arguments: fmt::Arguments<'_>) {
    let mut console = match CONSOLE.try_lock() {
        Some(guard) => Console { base: guard.base },
        None => Console { base: DEFAULT_BASE },
    };
    // Writing to the console cannot fail.
    let _ = console.write_fmt(format_args!("[host] {arguments}\n"));
}

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let level = match record.level() {
            log::Level::Error => "error: ",
            log::Level::Warn => "warning: ",
            log::Level::Info | log::Level::Debug | log::Level::Trace => "",
        };
        force(format_args!("{level}{}", record.args()));
    }

    fn flush(&self) {}
}

static LOGGER: Logger = Logger;

/// Sends the log to the console.
pub fn start_log(level: log::LevelFilter) {
    // It fails only where a logger is set already: then there is one.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(level);
}
