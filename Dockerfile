# The live page and predictions over HTTP: docker build -t vitrail . && docker run -p 127.0.0.1:8000:8000 vitrail
FROM python:3.12-slim
WORKDIR /vitrail
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
 && pip install --no-cache-dir -r requirements.txt \
 && useradd --create-home vitrail
USER vitrail
WORKDIR /home/vitrail
EXPOSE 8000
ENTRYPOINT ["vitrail", "serve", "--no_browser", "--host", "0.0.0.0"]
