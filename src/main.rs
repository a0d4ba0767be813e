//! The `h1` program.

fn main() -> std::process::ExitCode {
    h1::cli::run()
}
